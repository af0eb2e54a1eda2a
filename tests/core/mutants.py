"""Do the core's tests notice realistic slips? Plant them one at a time in a copy, and run the tests that should.

    python -m tests.core.mutants [--only NAME | --after NAME]

A slip that no test notices on NumPy alone, which is quick, has to be noticed on another array library. Prints a table in Markdown; the exit status is 1 if fewer than nine of ten are caught, 2 if a slip cannot be planted
or the tests fail without any.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("tokenexit", "adapters", "tests", "examples", "pyproject.toml")


@dataclass(frozen=True)
class Mutant:
    """A slip: in `file`, which must have `old` exactly once, it becomes `new`; `tests` should notice."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


SCORES, POLICIES, RETENTION = ("test_scores",), ("test_policies", "test_static"), ("test_retention", "test_static")
CELLS = ("test_cells", "test_static")
SURROUNDINGS = ("test_surroundings",)
CALIBRATE = ("test_calibrate",)
SEMANTIC = ("test_semantic", "test_static")
TOKENS, LEDGER, SCHEDULE, COST = ("test_tokens",), ("test_ledger",), ("test_schedule",), ("test_cost",)
GATES = ("test_gates",)
EXITS, LADDERS = ("test_exits",), ("test_ladders",)
FEATURES, FITTING = ("test_features",), ("test_fitting",)
MERGING = ("test_merging",)
SEARCH = ("test_search",)
WINDOWS, PREDICTION = ("test_windows",), ("test_prediction",)
ASSESSMENT = ("test_assessment",)

MUTANTS = (
    Mutant(
        "of two that are as fast the one a hundredth ahead is better",
        "assessment/results.py",
        "return rival.loss <= chosen.loss if tie else times > middle",
        "return times > middle",
        ASSESSMENT,
    ),
    Mutant(
        "two chains try one plan",
        "assessment/contenders.py",
        "for one in chain if once[one.name] == place}",
        "for one in chain}",
        ASSESSMENT,
    ),
    Mutant(
        "a preset for another depth is followed",
        "schedule.py",
        "if plan.depth in (None, depth):",
        "if True:",
        ("test_schedule",),
    ),
    Mutant(
        "a policy that does not say what it reads reads no classes",
        "policies/policy.py",
        "return silent or not read.isdisjoint(SCORES)",
        "return not read.isdisjoint(SCORES)",
        ("test_policies",),
    ),
    Mutant(
        "a target that a plan just reaches is out of reach",
        "assessment/results.py",
        "if one.saving >= saving]",
        "if one.saving > saving]",
        ASSESSMENT,
    ),
    Mutant(
        "a plan that is slower than dense is chosen",
        "assessment/results.py",
        "return best if best is not None and best.times > 1 else None",
        "return best",
        ASSESSMENT,
    ),
    Mutant(
        "bolder plans are tried whatever the last one changed",
        "assessment/run.py",
        "            if row.loss > _BOLD * at_most:",
        "            if row.loss < 0:",
        ASSESSMENT,
    ),
    Mutant(
        "without time nothing is run",
        "assessment/run.py",
        "            if late and contender.name not in firsts:",
        "            if late:",
        ASSESSMENT,
    ),
    Mutant(
        "an option that another beats is kept",
        "assessment/results.py",
        "in reversed(frontier(known))",
        "in known",
        ASSESSMENT,
    ),
    Mutant(
        "leavers leave their own feature, where a translation is to rejoin",
        "exits.py",
        "    if isinstance(carry, Feature):\n        return tokens",
        "    if isinstance(carry, Feature | Translated):\n        return tokens",
        EXITS,
    ),
    Mutant(
        "what has left holds its neighbours back for its error",
        "policies/kinds.py",
        '            passing = passing | (~runs & ~xp.isnan(evidence.score("error")))\n',
        "",
        POLICIES,
    ),
    Mutant(
        "tokens that are merged count as left",
        "policies/kinds.py",
        "            if merged is not None:  # a token that belongs",
        "            if False:  # a token that belongs",
        EXITS,
    ),
    Mutant(
        "an unknown place passes for one that has left",
        "policies/kinds.py",
        "return xp.astype(~xp.isnan(settled), xp.int32) - 1",
        "return xp.zeros_like(settled, dtype=xp.int32)",
        POLICIES,
    ),
    Mutant(
        "the greatest error is the most certain",
        "exits.py",
        "    return -error, xp.zeros_like(error",
        "    return error, xp.zeros_like(error",
        EXITS,
    ),
    Mutant(
        "a rule without classes keeps classes apart at a merge",
        "exits.py",
        "    label = label if policy.asks_classes else xp.zeros_like(label) - 1\n",
        "",
        EXITS,
    ),
    Mutant(
        "a head that foretells nothing forgets what was foretold",
        "exits.py",
        "    if output.error is not None:\n",
        "    found = replace(found, error=None)\n    if output.error is not None:\n",
        EXITS,
    ),
    Mutant(
        "features for fewer taps are the first ones",
        "ledger.py",
        "found = xp.concat([read, found], axis=-1)",
        "found = xp.concat([found, read], axis=-1)",
        EXITS,
    ),
    Mutant(
        "steps through a decoder begin with the last weights",
        "fitting.py",
        "        learner.revert()\n",
        "        learner.keep()\n",
        FITTING,
    ),
    Mutant(
        "a resumed fit begins again with the first images",
        "fitting.py",
        "batches = data.batches.steps(size, standing.decoded)",
        "batches = data.batches.steps(size, 0)",
        FITTING,
    ),
    Mutant(
        "images held out are shown to the decoder's steps",
        "features.py",
        "        turn = sum(1 for _ in self._cuts(size, 0, self.fitted))\n        found = islice(self._parts(size, 0, self.fitted)",
        "        turn = sum(1 for _ in self._cuts(size, 0, self.fitted))\n        found = islice(self._parts(size, 0, sum(self.sizes))",
        FITTING,
    ),
    Mutant(
        "a search by foretold errors begins with the boldest",
        "search.py",
        '_CAREFUL: Mapping[By, int] = {"confidence": -1, "error": 0}',
        '_CAREFUL: Mapping[By, int] = {"confidence": -1, "error": -1}',
        SEARCH,
    ),
    Mutant(
        "a translator is counted without the final head",
        "cost.py",
        "return own if final is None else own + final + HeadCost(norm * width)",
        "return own if final is None else own + HeadCost(norm * width)",
        COST,
    ),
    Mutant(
        "translations do not rejoin",
        "schedule.py",
        "        elif isinstance(self.carry, Translated):\n            rejoin = depth\n",
        "",
        SCHEDULE,
    ),
    Mutant(
        "scores in the precision that comes in",
        "scores.py",
        "    logits = xp.astype(logits, xp.float32)\n    return logits - xp.max",
        "    return logits - xp.max",
        SCORES,
    ),
    Mutant(
        "entropy in bits",
        "scores.py",
        "return nats / math.log(logits.shape[-1])",
        "return nats / math.log(2)",
        SCORES,
    ),
    Mutant(
        "margin to the next lower score, not to an equal one",
        "scores.py",
        "xp.where(classes == best,",
        "xp.where(weight == xp.max(weight, axis=-1, keepdims=True),",
        SCORES,
    ),
    Mutant(
        "confidence at the threshold leaves",
        "policies/policy.py",
        'return value > limit if self.direction == "above" else value < limit',
        'return value >= limit if self.direction == "above" else value < limit',
        POLICIES,
    ),
    Mutant(
        "NaN leaves by a negated policy",
        "policies/policy.py",
        "return ~self.policy(evidence) & evidence.known",
        "return ~self.policy(evidence)",
        POLICIES,
    ),
    Mutant(
        "protected tokens leave",
        "policies/evidence.py",
        "return able if self.protected is None else able & ~self.protected",
        "return able",
        POLICIES,
    ),
    Mutant(
        "neighbours beyond the edge of the grid",
        "_grid.py",
        "wide = xp.concat([*[first] * reach, map, *[last] * reach], axis=axis)",
        "wide = xp.concat([*[last] * reach, map, *[first] * reach], axis=axis)",
        POLICIES,
    ),
    Mutant(
        "settled neighbours count without their confidence",
        "policies/kinds.py",
        "return _voting(evidence.settled_label, evidence.settled_score > limit)",
        "return evidence.settled_label",
        POLICIES,
    ),
    Mutant(
        "settled neighbours on the grid agree with none",
        "policies/kinds.py",
        "return passing & self._agreed(votes, evidence)\n        height",
        "votes = xp.where(evidence.eligible, votes, -1)\n            return passing & self._agreed(votes, evidence)\n        height",
        ("test_policies", "test_exits"),
    ),
    Mutant(
        "protected tokens of the grid are neighbours",
        "policies/kinds.py",
        "votes = votes if evidence.protected is None else xp.where(evidence.protected, -1, votes)",
        "votes = votes if evidence.protected is None else votes",
        POLICIES,
    ),
    Mutant(
        "pooling reaches a place less",
        "_array.py",
        'tuple(2 * one + 1 for one in radius)\n    options = {"stride": 1, "padding": radius}',
        'tuple(2 * max(one - 1, 0) + 1 for one in radius)\n    options = {"stride": 1, "padding": tuple(max(one - 1, 0) for one in radius)}',
        ("test_policies", "test_exits"),
    ),
    Mutant(
        "groups are asked for their first",
        "retention.py",
        "kth_least(xp.where(is_of, rank[..., None, :], tokens), k)",
        "kth_least(xp.where(is_of, rank[..., None, :], tokens), 1)",
        RETENTION,
    ),
    Mutant(
        "of equal scores the later token is kept",
        "retention.py",
        "order = xp.argsort(without_nan(score), axis=-1, descending=True, stable=True)",
        "order = xp.flip(xp.argsort(without_nan(score), axis=-1, stable=True), axis=-1)",
        RETENTION,
    ),
    Mutant(
        "the shorter row forgets the first batch",
        "tokens.py",
        "return Packing(running, rows if packing.is_full else take(packing.index, rows)), rows",
        "return Packing(running, rows), rows",
        ("test_tokens",),
    ),
    Mutant(
        "frozen class scores are lost",
        "ledger.py",
        "return scatter(found, receipt, into=held)",
        "return scatter(found, receipt, into=array_namespace(held).zeros_like(held))",
        ("test_ledger", "test_exits"),
    ),
    Mutant(
        "cells merge where a quarter is gone",
        "merging.py",
        "ready = xp.all(_first_of_quarters(whole, side, merged), axis=(2, 4))",
        "ready = xp.any(_first_of_quarters(whole, side, merged), axis=(2, 4))",
        MERGING,
    ),
    Mutant(
        "quarters of any size merge",
        "merging.py",
        "whole = merged.running & (merged.size == (side // 2) ** 2)",
        "whole = merged.running",
        MERGING,
    ),
    Mutant(
        "similarity counts tokens with themselves",
        "merging.py",
        "(xp.sum(total * total, axis=-1) - 4) / 12",
        "xp.sum(total * total, axis=-1) / 16",
        MERGING,
    ),
    Mutant(
        "a merged token is its first",
        "merging.py",
        "entries = xp.where(ready[..., None], mean, quarters[0])",
        "entries = quarters[0]",
        MERGING,
    ),
    Mutant(
        "merged tokens hold four",
        "merging.py",
        "size=xp.where(leads, side * side, merged.size),",
        "size=xp.where(leads, 4, merged.size),",
        MERGING,
    ),
    Mutant(
        "one agreed token speaks for its cell",
        "merging.py",
        "ready = ready & xp.all(_by_cell(agreed, side, merged), axis=(2, 4))",
        "ready = ready & xp.any(_by_cell(agreed, side, merged), axis=(2, 4))",
        MERGING,
    ),
    Mutant(
        "cells merge over classes",
        "merging.py",
        "ready = ready & (xp.min(labels, axis=(2, 4)) == xp.max(labels, axis=(2, 4)))",
        "ready = ready & (xp.min(labels, axis=(2, 4)) <= xp.max(labels, axis=(2, 4)))",
        MERGING,
    ),
    Mutant(
        "the least alike merge for lack of room",
        "merging.py",
        "xp.where(xp.isnan(alike), 2.0, -alike)",
        "xp.where(xp.isnan(alike), 2.0, alike)",
        MERGING,
    ),
    Mutant(
        "cells merge until there is room for one more",
        "merging.py",
        "cells = (_entries(merged) - capacity + 2) // 3",
        "cells = (_entries(merged) - capacity) // 3",
        MERGING,
    ),
    Mutant(
        "cells with holes merge for lack of room",
        "merging.py",
        "distance = xp.where(ready, xp.where",
        "distance = xp.where(ready | ~ready, xp.where",
        MERGING,
    ),
    Mutant(
        "an entry leaves if its first token would",
        "merging.py",
        "        found = xp.where(own == side * side, _everywhere(every, side, merged), found)\n",
        "        found = xp.where(own == -1, _everywhere(every, side, merged), found)\n",
        MERGING,
    ),
    Mutant(
        "members keep the owner of before",
        "merging.py",
        "owner=xp.where(joins, first, merged.owner),",
        "owner=merged.owner,",
        MERGING,
    ),
    Mutant(
        "a share is one of all cells",
        "merging.py",
        "wanted = math.floor(share * count + 0.5)",
        "wanted = math.floor(share * total + 0.5)",
        MERGING,
    ),
    Mutant(
        "cells at the threshold of a share merge with those above",
        "merging.py",
        "return min(1.0, between if between < last else following)",
        "return min(1.0, between)",
        MERGING,
    ),
    Mutant(
        "merged angles are plain means",
        "merging.py",
        "length = xp.where(length > 0, length, 1.0)",
        "length = xp.where(length > 0, 1.0, 1.0)",
        MERGING,
    ),
    Mutant(
        "decisions look at what lies at members",
        "exits.py",
        "given = spread(given, merged.owner)",
        "given = given * 1",
        MERGING,
    ),
    Mutant(
        "marks of members are their own",
        "exits.py",
        "return (marks if merged is None else spread(marks, merged.owner)), label",
        "return marks, label",
        MERGING,
    ),
    Mutant(
        "budget rounded up",
        "policies/kinds.py",
        "xp.astype(rank, xp.float32) + 0.5 > keep",
        "xp.astype(rank, xp.float32) >= keep",
        POLICIES,
    ),
    Mutant(
        "those that stay anyhow do not count for the minimum",
        "policies/policy.py",
        "xp.where(leave, xp.where(hardness > most, most, hardness), xp.inf)",
        "hardness",
        POLICIES,
    ),
    Mutant(
        "the oldest exits instead of the latest",
        "policies/kinds.py",
        "evidence.previous[seen - self.exits :, :]",
        "evidence.previous[: self.exits, :]",
        POLICIES,
    ),
    Mutant(
        "groups of several images overlap",
        "policies/policy.py",
        "else evidence.image * classes + label",
        "else evidence.image * images + label",
        POLICIES,
    ),
    Mutant(
        "of equal tokens in a long row, the last is not kept",
        "retention.py",
        "((score == least) & (numbers[: score.shape[0]] <= take(last(), group)))",
        "((score == least) & (numbers[: score.shape[0]] < take(last(), group)))",
        RETENTION,
    ),
    Mutant(
        "NaN ranks as it is sorted",
        "_array.py",
        "    return xp.where(xp.isnan(score), -xp.inf, score)",
        "    return score",
        RETENTION,
    ),
    Mutant(
        "finalists of a tournament out of order",
        "retention.py",
        "    picked = xp.sort(picked, axis=-1)\n",
        "",
        RETENTION,
    ),
    Mutant(
        "one chunk too few in the finals",
        "retention.py",
        "first_k(champion, min(k, chunks))",
        "first_k(champion, max(1, min(k, chunks) - 1))",
        RETENTION,
    ),
    Mutant(
        "NaN is the first to be surplus",
        "tokens.py",
        "xp.where(xp.isnan(score), -xp.inf, score)\n    order",
        "xp.where(xp.isnan(score), xp.inf, score)\n    order",
        TOKENS,
    ),
    Mutant(
        "tokens that do not stay take up room",
        "tokens.py",
        "before = xp.cumulative_sum(xp.astype(take_along_axis(stay, order, axis=1), many), axis=1)",
        "before = xp.cumulative_sum(xp.astype(xp.ones_like(stay), many), axis=1)",
        TOKENS,
    ),
    Mutant(
        "of equal scores the earlier slot is surplus",
        "tokens.py",
        "xp.argsort(xp.where(stay, score, xp.inf), axis=1, stable=True)",
        "xp.flip(xp.argsort(xp.where(stay, -score, -xp.inf), axis=1, stable=True), axis=1)",
        TOKENS,
    ),
    Mutant(
        "the wrong side of equal counts",
        "tokens.py",
        "picked = xp.reshape(searchsorted(counted, wanted), (images, capacity))",
        "picked = xp.reshape(searchsorted(counted, wanted + 1), (images, capacity))",
        TOKENS,
    ),
    Mutant(
        "the smaller selection forgets the first batch",
        "tokens.py",
        "slot_of = take_along_axis(selection.slot_of, entry, axis=1)",
        "slot_of = entry",
        TOKENS,
    ),
    Mutant(
        "entries that are not valid are selected again",
        "tokens.py",
        "_fit(stay & selection.valid, score,",
        "_fit(stay, score,",
        TOKENS,
    ),
    Mutant(
        "those that run on are settled too",
        "ledger.py",
        "return freeze(ledger, scatter(leave, receipt, into=nothing), depth=depth)",
        "return freeze(ledger, receipt.running, depth=depth)",
        LEDGER,
    ),
    Mutant(
        "leavers fold at the share",
        "ledger.py",
        "xp.reshape(leaving > above * others,",
        "xp.reshape(leaving >= above * others,",
        LEDGER,
    ),
    Mutant(
        "the token that takes the leavers in counts as one of the others",
        "ledger.py",
        "axis=1, keepdims=True) - 1\n",
        "axis=1, keepdims=True)\n",
        LEDGER,
    ),
    Mutant(
        "two exits after one block",
        "schedule.py",
        "list(self.after) == sorted(set(self.after)),",
        "list(self.after) == sorted(self.after),",
        SCHEDULE,
    ),
    Mutant(
        "an exit head reads the tokens of the next block",
        "cost.py",
        "tokens[:, after - 1] - self.prefix",
        "tokens[:, after] - self.prefix",
        COST,
    ),
    Mutant(
        "a token in the middle does not count itself",
        "cells.py",
        "return xp.reshape(1 + more, receipt.layout)",
        "return xp.reshape(xp.where(middle, more, 1 + more), receipt.layout)",
        CELLS,
    ),
    Mutant(
        "cells of all images are those of the first",
        "cells.py",
        "    cell = cell + receipt.image * (_count(height, side) * _count(width, side))\n",
        "",
        CELLS,
    ),
    Mutant(
        "the first of a cell is its middle",
        "cells.py",
        "return (first + last) // 2",
        "return first",
        CELLS,
    ),
    Mutant(
        "what has left counts in the mean around a token",
        "surroundings.py",
        "by_slot[:, prefix:, :], receipt.running[:, prefix:]",
        "by_slot[:, prefix:, :], receipt.running[:, prefix:] | True",
        SURROUNDINGS,
    ),
    Mutant(
        "a neighbourhood has a row and a column too few",
        "surroundings.py",
        "for first in range(2 * reach + 1):",
        "for first in range(2 * reach):",
        SURROUNDINGS,
    ),
    Mutant(
        "prefix tokens are places of the grid",
        "surroundings.py",
        "xp.concat([nothing[:, :prefix, :], around], axis=1)",
        "xp.concat([around, nothing[:, :prefix, :]], axis=1)",
        SURROUNDINGS,
    ),
    Mutant(
        "padding wins a maximum of negative numbers",
        "semantic.py",
        "xp.where(marks, cut, -xp.inf)",
        "xp.where(marks, cut, 0.0)",
        SEMANTIC,
    ),
    Mutant(
        "padding counts in a mean",
        "semantic.py",
        "many = xp.sum(xp.astype(marks, wide.dtype), axis=(2, 4))",
        "many = xp.sum(xp.ones_like(xp.astype(marks, wide.dtype)), axis=(2, 4))",
        SEMANTIC,
    ),
    Mutant(
        "neighbourhoods begin where their window begins",
        "semantic.py",
        "start = counting(count, like) * side - (reach - side) // 2",
        "start = counting(count, like) * side",
        SEMANTIC,
    ),
    Mutant(
        "a cell runs on into the next window",
        "semantic.py",
        "(place < stop[:, None]) & (place < size)",
        "place < size",
        SEMANTIC,
    ),
    Mutant(
        "an annealed number is one step late",
        "training.py",
        "max(step - self.wait, 0) / self.steps",
        "max(step - self.wait - 1, 0) / self.steps",
        ("test_training",),
    ),
    Mutant(
        "the frontier keeps what is as good and dearer",
        "search.py",
        "one.quality > best[-1].quality",
        "one.quality >= best[-1].quality",
        ("test_search",),
    ),
    Mutant(
        "a bet on an image that was already seen",
        "guarantees/bounds.py",
        "before = xp.concat([xp.full_like(variance[:1, ...], 0.25), variance[:-1, ...]], axis=0)",
        "before = variance",
        ("test_bounds",),
    ),
    Mutant(
        "the count of Bentkus rounded down",
        "guarantees/bounds.py",
        "whole = xp.ceil(total)",
        "whole = xp.floor(total)",
        ("test_bounds",),
    ),
    Mutant(
        "the end of the game instead of its best",
        "guarantees/bounds.py",
        "xp.clip(xp.max(wealth, axis=0), 0.0, None)",
        "xp.clip(wealth[-1, ...], 0.0, None)",
        ("test_bounds",),
    ),
    Mutant(
        "the first that fails is certified, too",
        "guarantees/calibration.py",
        "next((at for at, p in enumerate(row) if not p <= delta), len(row))",
        "next((at + 1 for at, p in enumerate(row) if not p <= delta), len(row))",
        ("test_calibration",),
    ),
    Mutant(
        "the bound of the chosen setting by itself",
        "guarantees/calibration.py",
        "delta=(1 - asked.confidence) / len(settings), test=asked.test",
        "delta=1 - asked.confidence, test=asked.test",
        ("test_calibration",),
    ),
    Mutant(
        "bounds for those settings alone that were run",
        "guarantees/calibration.py",
        "delta=(1 - asked.confidence) / len(settings), test=asked.test",
        "delta=(1 - asked.confidence) / len(places), test=asked.test",
        ("test_calibration",),
    ),
    Mutant(
        "the best class stands for all",
        "guarantees/calibration.py",
        "array_namespace(table).max(table, axis=1)",
        "array_namespace(table).min(table, axis=1)",
        ("test_calibration",),
    ),
    Mutant(
        "chains do not share the confidence",
        "guarantees/calibration.py",
        "return (1 - self.confidence) / len(self.chains)",
        "return 1 - self.confidence",
        ("test_calibration",),
    ),
    Mutant(
        "conformal without the one image more",
        "guarantees/calibration.py",
        "axis=0) + 1) / (images + 1)",
        "axis=0)) / images",
        ("test_calibration",),
    ),
    Mutant(
        "any checksum will do",
        "sealed.py",
        "require(found == _checksum(content), _CHECKSUM, rule, shortened(found))",
        "pass",
        ("test_sealed", "test_certificate"),
    ),
    Mutant(
        "the last of two equal keys counts",
        "sealed.py",
        "    if len(data) < len(pairs):",
        "    if len(data) > len(pairs):",
        ("test_sealed",),
    ),
    Mutant(
        "a plan before its weights",
        "folders.py",
        """    write(folder / named.file, weights)
    write(folder / f"{kind}.json", text)
""",
        """    write(folder / f"{kind}.json", text)
    write(folder / named.file, weights)
""",
        ("test_folders",),
    ),
    Mutant(
        "the old weights go before the new plan comes",
        "folders.py",
        """    write(folder / f"{kind}.json", text)
""",
        """    _remove_strays(folder, kind, named.file, before)
    write(folder / f"{kind}.json", text)
""",
        ("test_folders",),
    ),
    Mutant(
        "weights of the right size will do",
        "folders.py",
        "return None if digest == weights.sha256 else",
        "return None if True else",
        ("test_folders",),
    ),
    Mutant(
        "what fails leaves its part behind",
        "folders.py",
        "            part.unlink(missing_ok=True)",
        "            pass",
        ("test_folders",),
    ),
    Mutant(
        "the first of several kinds in a folder is loaded",
        "folders.py",
        'require(len(there) == 1, "kind", several, "None")',
        "",
        ("test_folders",),
    ),
    Mutant(
        "an option of another kind is dropped without a word",
        "folders.py",
        "        require(name in takers, option, rule, type(value).__name__)\n    return loader(network, folder, **given)",
        "        given = given if name in takers else {}\n    return loader(network, folder, **given)",
        ("test_folders",),
    ),
    Mutant(
        "a network of another depth will do",
        "manifest.py",
        'for name, found in (("width", width), ("depth", depth)):',
        'for name, found in (("width", width),):',
        ("test_manifest",),
    ),
    Mutant(
        "gates may have more than two logits",
        "manifest.py",
        "gates = manifest.classes == 2 and not manifest.built_head",
        "gates = not manifest.built_head",
        ("test_manifest",),
    ),
    Mutant(
        "the final head's weights need not be in the file",
        "manifest.py",
        '{"head": one(1) if final is None else final} if manifest.built_head else {}',
        "{}",
        ("test_manifest",),
    ),
    Mutant(
        "weights that are missing are not missed",
        "weights.py",
        "[*sorted(found), *sorted({*wanted} - {*found})]",
        "[*sorted(found)]",
        ("test_weights",),
    ),
    Mutant(
        "counts stand in for weights",
        "weights.py",
        'dtypes = FLOATING if "float" in wanted[name].dtype else WHOLE',
        "dtypes = FLOATING + WHOLE",
        ("test_weights",),
    ),
    Mutant(
        "tensors that were not certified are not looked at",
        "guarantees/certificate.py",
        "sorted(set(certified.weights) | set(fingerprints.weights))",
        "sorted(set(certified.weights))",
        ("test_certificate",),
    ),
    Mutant(
        "every statistic at the full rate of alarms",
        "guarantees/drift.py",
        "one.p_value * len(self.compared) <=",
        "one.p_value <=",
        ("test_drift",),
    ),
    Mutant(
        "ties are steps of their own",
        "guarantees/drift.py",
        "steps[value] = steps.get(value, 0) + step",
        "steps[value] = steps.get(value, 0) + step if step > 0 else step",
        ("test_drift",),
    ),
    Mutant(
        "a token at its class's threshold leaves",
        "guarantees/ladders.py",
        'side="right")',
        'side="left")',
        ("test_ladders",),
    ),
    Mutant(
        "pixels that do not count disagree",
        "guarantees/risks.py",
        "return _share((exiting != dense) & counts, counts)",
        "return _share(exiting != dense, counts)",
        ("test_risks",),
    ),
    Mutant(
        "an image of which no pixel counts has lost nothing",
        "guarantees/risks.py",
        "return found / xp.where(of > 0, of, xp.nan)",
        "return found / xp.where(of > 0, of, 1.0)",
        ("test_risks",),
    ),
    Mutant(
        "a label that no class has is wrong twice",
        "guarantees/risks.py",
        "xp.where(strange, xp.nan, ",
        "xp.where(strange, 0.0, ",
        ("test_risks",),
    ),
    Mutant(
        "patches lie over the whole image",
        "area.py",
        "covered * shown / (cells * side)",
        "side * shown / (cells * side)",
        ("test_area",),
    ),
    Mutant(
        "too few images see no drift",
        "guarantees/drift.py",
        "if self.blind:",
        "if False:",
        ("test_drift",),
    ),
    Mutant(
        "copies of an image are independent",
        "guarantees/calibrate.py",
        "if first.setdefault(one, at) != at:",
        "if first.setdefault(one, at) > at:",
        CALIBRATE,
    ),
    Mutant(
        "images of later passes are not looked at",
        "guarantees/calibrate.py",
        "self._require(digests == self.digests[rows])",
        "self._require(True)",
        CALIBRATE,
    ),
    Mutant(
        "a pass may end early",
        "guarantees/calibrate.py",
        "self._require(start == len(self))",
        "self._require(start <= len(self))",
        CALIBRATE,
    ),
    Mutant(
        "a batch that trades is calibrated",
        "guarantees/calibrate.py",
        "mixed = any(exit.policy.mixes_images for exit in plan.exits)",
        "mixed = False",
        CALIBRATE,
    ),
    Mutant(
        "images that fitted the heads are like any others",
        "guarantees/calibrate.py",
        "    if known == 0:",
        "    if known >= 0:",
        CALIBRATE,
    ),
    Mutant(
        "each batch is compared with the first",
        "guarantees/calibrate.py",
        "        reference = reference[rows, ...]\n",
        "        reference = reference[: maps.shape[0], ...]\n",
        CALIBRATE,
    ),
    Mutant(
        "labels are those of the first batch",
        "guarantees/calibrate.py",
        "with_doubles(self.risk.labels)[rows, ...]",
        "with_doubles(self.risk.labels)[: maps.shape[0], ...]",
        CALIBRATE,
    ),
    Mutant(
        "a cost is a share of itself",
        "guarantees/calibrate.py",
        "for one in (found, self.reference))",
        "for one in (found, found))",
        CALIBRATE,
    ),
    Mutant(
        "what was kept may be of another setting",
        "guarantees/calibrate.py",
        '"part": name}',
        '"part": "setting"}',
        CALIBRATE,
    ),
    Mutant(
        "a resumed network may be another now",
        "guarantees/calibrate.py",
        'if kept and (name == "dense" or self.loss.size is None):',
        'if not kept and (name == "dense" or self.loss.size is None):',
        CALIBRATE,
    ),
    Mutant(
        "the dense network is compared with itself",
        "guarantees/calibrate.py",
        "lambda: out if plan == dense() else run(dense()))",
        "lambda: out if plan == dense() else out)",
        CALIBRATE,
    ),
    Mutant(
        "losses of a user's own may be anything",
        "guarantees/calibrate.py",
        "strange = [one for one in losses if not 0 <= one <= 1]",
        "strange = [one for one in losses if one < 0 or one > 1]",
        CALIBRATE,
    ),
    Mutant(
        "an edited calibration is resumed",
        "guarantees/calibrate.py",
        "if found.get(name) != value]",
        "if name not in found]",
        CALIBRATE,
    ),
    Mutant(
        "no image is run alone",
        "guarantees/calibrate.py",
        "if rows.start == 0 and rows.stop > 1:",
        "if rows.start == 0 and rows.stop < 1:",
        CALIBRATE,
    ),
    Mutant(
        "a skipped patch returns though none may",
        "gates.py",
        "return keep if before is None else keep & before",
        "return keep",
        GATES,
    ),
    Mutant(
        "patches that never return compete for a budget",
        "gates.py",
        "array_namespace(probability).where(before, probability, 0.0)",
        "probability",
        GATES,
    ),
    Mutant(
        "patches of all images compete with those of the first",
        "gates.py",
        "image=index // max(patches, 1)",
        "image=index // max(images * patches, 1)",
        GATES,
    ),
    Mutant(
        "the gates before one decide as they did when it was not calibrated",
        "gates.py",
        "threshold_for(probabilities(found, after), rate)",
        "threshold_for(probabilities(plan, after), rate)",
        GATES,
    ),
    Mutant(
        "tokens that are skipped never rejoin for the last block",
        "schedule.py",
        "isinstance(self.carry, Preserved) and self.carry.before",
        "isinstance(self.carry, Feature) and self.carry.before",
        GATES,
    ),
    Mutant(
        "the last block runs alone though nothing is skipped",
        "schedule.py",
        ' == "last block" and len(exits) > 0:',
        ' == "last block":',
        GATES,
    ),
    Mutant(
        "skipped tokens attend",
        "cost.py",
        "(3 * dim**2 + 2 * self.width * active)",
        "(3 * dim**2 + 2 * self.width * slots)",
        COST,
    ),
    Mutant(
        "gates read the patches alone",
        "cost.py",
        "sum(slots * gate.per_token + gate.fixed for gate in gates)",
        "sum(patches * gate.per_token + gate.fixed for gate in gates)",
        COST,
    ),
    Mutant(
        "one product of attention instead of two",
        "cost.py",
        "return 2 * self.width * tokens * tokens",
        "return self.width * tokens * tokens",
        COST,
    ),
    Mutant(
        "a finished image keeps its cell centres",
        "exits.py",
        "(centre[None, :] & runs & running[:, prefix:])",
        "(centre[None, :] & running[:, prefix:])",
        EXITS,
    ),
    Mutant(
        "prefix tokens run on in finished images",
        "exits.py",
        "xp.broadcast_to(runs, (shape[0], prefix))",
        "running[:, :prefix]",
        EXITS,
    ),
    Mutant(
        "cell centres may leave for lack of room",
        "exits.py",
        "        if self.centre is not None:\n",
        "        if self.centre is not None and self.confidence is None:\n",
        EXITS,
    ),
    Mutant(
        "slots that do not run stay",
        "exits.py",
        "remain = xp.reshape(evidence.eligible ^ leave, shape)",
        "remain = xp.reshape(~leave, shape)",
        EXITS,
    ),
    Mutant(
        "presence of images that are finished changes on",
        "exits.py",
        "    ran = receipt.lengths > 0\n",
        "    ran = receipt.lengths >= 0\n",
        EXITS,
    ),
    Mutant(
        "class scores of another slot",
        "exits.py",
        "table = xp.reshape(given[:, prefix:, :], (entries, classes))",
        "table = xp.reshape(given[:, :places, :], (entries, classes))",
        EXITS,
    ),
    Mutant(
        "patches are those of other slots",
        "exits.py",
        "valid=xp.reshape(running[:, prefix:], (entries,)),",
        "valid=xp.reshape(running[:, :places], (entries,)),",
        EXITS,
    ),
    Mutant(
        "tokens that left run through the next blocks",
        "replay.py",
        "held = receipt.lengths\n",
        "held = receipt.lengths * 0 + places\n",
        EXITS,
    ),
    Mutant(
        "predictions of the present head are its earlier ones",
        "replay.py",
        "labels.append(decision.label)",
        "labels.append(xp.argmax(final, axis=-1))",
        EXITS,
    ),
    Mutant(
        "a replay ends in the first head",
        "replay.py",
        "book = exits.update(book, receipt, HeadOutput(tokens.gather(final, receipt)))",
        "book = exits.update(book, receipt, HeadOutput(tokens.gather(logits[min(logits)], receipt)))",
        EXITS,
    ),
    Mutant(
        "features rejoin a block too late",
        "schedule.py",
        'rejoin = depth - 1 if self.carry.before == "last block" else depth',
        "rejoin = depth",
        EXITS,
    ),
    Mutant(
        "exit points are numbered from the last",
        "schedule.py",
        "index = {after: at for at, after in enumerate(sorted(exits))}",
        "index = {after: at for at, after in enumerate(sorted(exits, reverse=True))}",
        EXITS,
    ),
    Mutant(
        "a policy inside does not say what it needs",
        "policies/policy.py",
        "return frozenset(self._reads().union(*(one.needs for one in self._inside)))",
        "return self._reads()",
        EXITS,
    ),
    Mutant(
        "batches that mix inside a composition are not seen",
        "policies/policy.py",
        "return self.mixes or any(one.mixes_images for one in self._inside)",
        "return self.mixes",
        EXITS,
    ),
    Mutant(
        "the turned policy is careful on the same side",
        "policies/policy.py",
        'turned = {"above": "below", "below": "above"}',
        'turned = {"above": "above", "below": "below"}',
        LADDERS,
    ),
    Mutant(
        "rows of several parts stay in the order of the parts",
        "features.py",
        "return _rows_at(_joined(found), xp.argsort(order))",
        "return _joined(found)",
        FEATURES,
    ),
    Mutant(
        "a stream goes on from its first batch",
        "features.py",
        "since % len(self._cuts(self._fitted)), None)",
        "0, None)",
        FEATURES,
    ),
    Mutant(
        "another batch in a stream is not noticed",
        "features.py",
        "if batch is None or self._teacher.fingerprint(batch) != self._prints[number]:",
        "if batch is None:",
        FEATURES,
    ),
    Mutant(
        "images held out are fitted to as well",
        "features.py",
        "            first.append({name: value[:cut, ...] for name, value in rows.items()})",
        "            first.append(rows)",
        FEATURES,
    ),
    Mutant(
        "rows on disk are those of any images",
        "features.py",
        '{**marks, "images": prints[-1]}',
        "marks",
        FEATURES,
    ),
    Mutant(
        "pixels that no patch covers are of patches below the grid",
        "features.py",
        "min(side, -(-side * reach // whole))",
        "side",
        FEATURES,
    ),
    Mutant(
        "a loss as low as the lowest counts as lower",
        "fitting.py",
        "if loss < (math.inf if self.best is None else self.best[0]):",
        "if loss <= (math.inf if self.best is None else self.best[0]):",
        FITTING,
    ),
    Mutant(
        "a fit ends one check too late",
        "fitting.py",
        "if standing.checks_since >= recipe.patience:",
        "if standing.checks_since > recipe.patience:",
        FITTING,
    ),
    Mutant(
        "half a step is written",
        "fitting.py",
        "if whole and saved is not None:",
        "if saved is not None:",
        FITTING,
    ),
    Mutant(
        "weights are kept at every check",
        "fitting.py",
        "if standing.best is not None and standing.best[1] == standing.step:",
        "if standing.best is not None:",
        FITTING,
    ),
    Mutant(
        "a learning rate that does not fall to zero",
        "fitting.py",
        "(1 + math.cos(math.pi * step / self.steps)) / 2",
        "(1 + math.cos(math.pi * step / self.steps / 2)) / 2",
        FITTING,
    ),
    Mutant(
        "another fit is resumed",
        "fitting.py",
        '        require_metadata("resume", self.file, self.marks, found)\n',
        "",
        FITTING,
    ),
    Mutant(
        "the last window is not shifted back to the edge",
        "windows.py",
        "return [*range(0, last, stride), last]",
        "return [*range(0, last + 1, stride)]",
        WINDOWS,
    ),
    Mutant(
        "shares of windows lean to one side",
        "windows.py",
        "xp.abs(2 * steps + 1 - side)",
        "xp.abs(2 * steps - side)",
        WINDOWS,
    ),
    Mutant(
        "scores of windows are added up without their shares",
        "windows.py",
        "(image, *_under(windows, corner, axis - 1)), share * pixels)",
        "(image, *_under(windows, corner, axis - 1)), pixels)",
        WINDOWS,
    ),
    Mutant(
        "scores of windows in half precision",
        "windows.py",
        "xp.result_type(scores.dtype, xp.float32)",
        "scores.dtype",
        WINDOWS,
    ),
    Mutant(
        "pictures of a batch in the order of their groups",
        "prediction.py",
        "rows[number] = row",
        "rows[sum(map(bool, rows))] = row",
        PREDICTION,
    ),
    Mutant(
        "every thread builds a model",
        "prediction.py",
        "        with self._lock:\n            if",
        "        with threading.Lock():\n            if",
        PREDICTION,
    ),
    Mutant(
        "a certificate for pictures of another size",
        "prediction.py",
        "shown = tuple(self.size) if raw and self.size is not None else (height, width)",
        "shown = wanted",
        PREDICTION,
    ),
)


def noticed(folder: Path, tests: tuple[str, ...]) -> tuple[bool, str, float]:
    """Whether these tests pass in a folder on every library, which was the first that did not, and the seconds."""
    passes, first, seconds = run(folder, tests, backends="numpy")
    if not passes:
        return passes, first, seconds
    passes, first, more = run(folder, tests)
    return passes, first, seconds + more


def run(folder: Path, tests: tuple[str, ...], *, backends: str = "") -> tuple[bool, str, float]:
    """Whether these tests pass in a folder, which was the first that did not, and the seconds it took."""
    start = time.perf_counter()
    files = [f"tests/core/{name}.py" for name in tests]
    path = os.pathsep.join([str(folder), str(folder / "adapters")])
    # Nothing compiled is kept: a slip of the same length, made within the same second, would not be seen.
    settings = {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "HYPOTHESIS_PROFILE": "quick"}
    settings["CORE_BACKENDS"] = backends
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *files],
        cwd=folder,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        check=False,
    )
    first = re.search(r"^(?:FAILED|ERROR) tests/core/(\S+)", done.stdout, flags=re.MULTILINE)
    if done.returncode not in (0, 1):
        raise SystemExit(f"pytest ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.returncode == 0, first.group(1) if first else "", time.perf_counter() - start


def main() -> int:
    """Plant the slips, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [mutant.name for mutant in MUTANTS]
    parser.add_argument("--only", choices=names, help="one slip instead of all")
    parser.add_argument("--after", choices=names, help="all behind this one, where a run was stopped")
    given = parser.parse_args()
    mutants = [mutant for mutant in MUTANTS if given.only in (None, mutant.name)]
    mutants = mutants if given.after is None else mutants[names.index(given.after) + 1 :]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, folder / name)
        before = {mutant.file: (folder / "tokenexit" / mutant.file).read_text() for mutant in mutants}
        for mutant in mutants:
            found = before[mutant.file].count(mutant.old)
            if found != 1:
                print(f"{mutant.name}: {mutant.file} has the text to change {found} times, not once", file=sys.stderr)
                return 2
        passes, first, _ = run(folder, tuple(dict.fromkeys(name for mutant in mutants for name in mutant.tests)))
        if not passes:
            print(f"the tests fail without any slip: {first}", file=sys.stderr)
            return 2
        caught = 0
        print("| slip | found | by | seconds |\n|---|---|---|---:|", flush=True)
        for mutant in mutants:
            file = folder / "tokenexit" / mutant.file
            file.write_text(before[mutant.file].replace(mutant.old, mutant.new))
            survived, test, seconds = noticed(folder, mutant.tests)
            file.write_text(before[mutant.file])
            caught += not survived
            by = f"`{test}`" if test else ""
            print(f"| {mutant.name} | {'survived' if survived else 'caught'} | {by} | {seconds:.0f} |", flush=True)
    print(f"\n{caught} of {len(mutants)} caught.")
    return 0 if caught * 10 >= len(mutants) * 9 else 1


if __name__ == "__main__":
    sys.exit(main())
