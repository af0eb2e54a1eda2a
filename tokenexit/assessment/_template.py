"""The page of an assessment, with places for what is filled in: HTML and CSS, and no script."""

from string import Template

__all__ = ["PAGE"]

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>$title</title>
<style>
:root {
  --paper: #f7f7f5; --card: #fff; --ink: #1b1c1e; --soft: #5a5d63; --line: #dedfdc; --mark: #e6f1f8;
  --yes: #006b4f; --no: #9a4a00;
  color-scheme: light dark;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #141517; --card: #1d1f22; --ink: #ececea; --soft: #a8abb1; --line: #35383d; --mark: #16354a;
    --yes: #5cd0a6; --no: #f0a35e;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  overflow-wrap: break-word;
}
main { max-width: 74rem; margin: 0 auto; padding: clamp(1.25rem, 4vw, 3.5rem) clamp(1rem, 4vw, 2.5rem) 4rem; }
h1 { margin: 0 0 .6rem; font-size: clamp(2.3rem, 8vw, 3.6rem); line-height: 1.08; letter-spacing: -.025em; }
h1.yes { color: var(--yes); }
h1.no { color: var(--no); }
h2 { margin: 0 0 .9rem; font-size: 1.3rem; line-height: 1.3; letter-spacing: -.01em; }
p { margin: 0 0 1rem; }
section { margin-top: clamp(2.5rem, 6vw, 4rem); }
.over { margin: 0 0 .75rem; color: var(--soft); font-size: .9rem; }
.lead { font-size: 1.2rem; line-height: 1.5; }
.soft, figcaption { color: var(--soft); font-size: .9rem; max-width: 42rem; }
.top { display: grid; gap: clamp(1.5rem, 4vw, 3.5rem); }
.top > * { min-width: 0; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(6rem, 1fr)); gap: 1rem 1.5rem; margin: 1.5rem 0; }
dl div { display: flex; flex-direction: column-reverse; justify-content: flex-end; }
dt { color: var(--soft); font-size: .9rem; line-height: 1.35; }
dd { margin: 0; font-size: 1.8rem; font-weight: 650; line-height: 1.25; font-variant-numeric: tabular-nums; }
figure { margin: 0; }
figcaption { margin-top: .7rem; }
.plot svg {
  display: block; width: 100%; height: auto; padding: clamp(.25rem, 1.5vw, .75rem); background: #fff;
  border: 1px solid var(--line); border-radius: .6rem;
}
.box {
  overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
}
.box:focus-visible, summary:focus-visible { outline: 2px solid #2b8fce; outline-offset: 2px; }
table { width: 100%; border-spacing: 0; font-size: .93rem; font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .9rem; text-align: right; white-space: nowrap; }
th:first-child, th:last-child, td:last-child { text-align: left; }
th[scope=row] { min-width: 15rem; max-width: 26rem; padding-left: 2.1rem; font-weight: 450; white-space: normal; }
th[scope=col] {
  min-width: 6rem; max-width: 9.5rem; color: var(--soft); font-size: .82rem; font-weight: 500;
  line-height: 1.3; vertical-align: bottom; white-space: normal;
}
th[scope=col]:nth-child(2) { min-width: 7.5rem; }
tbody th, tbody td { border-top: 1px solid var(--line); }
tr.chosen { background: var(--mark); }
tr.chosen th, tr.chosen td { font-weight: 650; }
td small { color: var(--soft); font-size: .82rem; font-weight: 400; }
.tag {
  margin-left: .5rem; padding: .1rem .5rem; border: 1px solid currentColor; border-radius: 1rem; font-size: .75rem;
  font-weight: 600; white-space: nowrap;
}
.dot {
  display: inline-block; width: .65rem; height: .65rem; margin: 0 .5rem 0 -1.15rem; border: 2px solid var(--dot);
  border-radius: 50%;
}
.dot.ours { background: var(--dot); }
pre { margin: 0; padding: .9rem 1.1rem; overflow-x: auto; font: .85rem/1.5 ui-monospace, Menlo, Consolas, monospace; }
code { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: .92em; }
pre code { font-size: 1em; }
details { margin-top: .9rem; }
summary { padding: .6rem 1.1rem; cursor: pointer; }
details pre { border-top: 1px solid var(--line); }
.maps { display: grid; gap: 1.75rem; }
.maps > * { min-width: 0; }
.maps .box { background: #fff; }
.maps img { display: block; width: 100%; min-width: 34rem; height: auto; }
ul { margin: 0; padding-left: 1.2rem; max-width: 46rem; }
li + li { margin-top: .4rem; }
@media (min-width: 60rem) {
  .top { grid-template-columns: minmax(0, 1fr) minmax(0, 33rem); }
  .top header { position: sticky; top: 2rem; align-self: start; }
}
@media (max-width: 45rem) {
  th, td { padding: .45rem .7rem; }
  th:first-child { position: sticky; left: 0; min-width: 10.5rem; max-width: 10.5rem; background: var(--card); }
  tr.chosen th:first-child { background: var(--mark); }
  th[scope=row] { padding-left: 1.8rem; }
  .tag { display: inline-block; margin: .25rem 0 0; }
}
@media print { .top { display: block; } .box { overflow: visible; } }
</style>
</head>
<body>
<main>
<div class="top">
<header>
<p class="over">$title</p>
<h1 class="$answer_class">$answer</h1>
<p class="lead">$verdict</p>
$figures_of_chosen$beside<p class="soft">$conditions</p>
</header>
<figure class="plot">
$plot
<figcaption>$reading</figcaption>
</figure>
</div>
<section>
<h2>Everything that was run</h2>
<div class="box" role="region" aria-label="Table of everything that was run" tabindex="0">
$table
</div>
</section>
$plan$maps$notes</main>
</body>
</html>
""")
