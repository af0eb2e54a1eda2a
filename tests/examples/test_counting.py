import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from examples.counting import multiply_adds


def test_what_runs_is_counted():
    linear, conv = nn.Linear(3, 5), nn.Conv2d(3, 4, 3, padding=1, bias=False)
    assert multiply_adds(lambda: linear(torch.zeros(2, 7, 3))) == 2 * 7 * 3 * 5
    assert multiply_adds(lambda: conv(torch.zeros(1, 3, 6, 8))) == 6 * 8 * 4 * 3 * 9


def test_both_products_of_attention_count_wherever_it_would_run():
    for device in ("cpu", "meta"):
        q, kv = torch.zeros(1, 2, 5, 8, device=device), torch.zeros(1, 2, 9, 8, device=device)
        assert multiply_adds(lambda q=q, kv=kv: scaled_dot_product_attention(q, kv, kv)) == 2 * 2 * 5 * 9 * 8
