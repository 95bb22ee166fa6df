"""PromptEmbedding: the embeddings of a prompt and of a text in one tensor."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pyfused.nn import ModulesToSaveWrapper, PromptEmbedding

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def words() -> nn.Embedding:
    torch.manual_seed(0)
    return nn.Embedding(11, 6).requires_grad_(False)


@pytest.fixture
def prompt() -> PromptEmbedding:
    torch.manual_seed(1)
    return PromptEmbedding(3, 6)


def joined(prompt: PromptEmbedding, embeds: torch.Tensor) -> torch.Tensor:
    """What it means, in copies."""
    rows = prompt.embedding.weight[: prompt.num_virtual_tokens].repeat(embeds.shape[0], 1, 1)
    return torch.cat((rows.to(embeds.dtype), embeds), dim=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (2, 7), (5, 0), (0, 4)], ids=str)
def test_output_and_gradient(words, prompt, dtype, shape):
    words, ids = words.to(dtype), torch.randint(11, shape)
    y = prompt(ids, words)
    expected = joined(prompt, words(ids))
    assert y.dtype == dtype
    assert torch.equal(y, expected)
    grad = torch.randn_like(y)
    (expected_grad,) = torch.autograd.grad(expected, prompt.embedding.weight, grad)
    (got,) = torch.autograd.grad(y, prompt.embedding.weight, grad)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected_grad)


def test_gradient_of_many_16_bit_rows_is_summed_in_float32(words, prompt):
    y = prompt(torch.zeros(1000, 1, dtype=torch.int64), words.to(torch.bfloat16))
    (got,) = torch.autograd.grad(y, prompt.embedding.weight, torch.full_like(y, 0.01))
    expected = 1000 * torch.tensor(0.01, dtype=torch.bfloat16).float()
    torch.testing.assert_close(got, expected.expand_as(got))


def test_it_is_written_into_what_the_word_embeddings_gave(words, prompt):
    """No copy of the text's embeddings."""
    given = []
    words.register_forward_hook(lambda module, args, output: given.append(output.data_ptr()))
    y = prompt(torch.randint(11, (2, 7)), words)
    assert given == [y.data_ptr()] and y.is_contiguous() and y.requires_grad


def test_given_embeddings(words, prompt):
    embeds = torch.randn(2, 4, 6, requires_grad=True)
    y = prompt(None, words, embeds)
    assert torch.equal(y, joined(prompt, embeds))
    grad = torch.randn_like(y)
    got = torch.autograd.grad(y, (prompt.embedding.weight, embeds), grad)
    assert torch.equal(got[1], grad[:, 3:])
    torch.testing.assert_close(got[0], grad[:, :3].sum(0))


def test_trained_word_embeddings_get_their_gradient_and_none_of_the_prompt(words, prompt):
    words.requires_grad_(True)
    ids = torch.tensor([[4, 4, 2]])
    y = prompt(ids, words)
    grad = torch.randn_like(y)
    y.backward(grad)
    expected = torch.zeros(11, 6).index_add(0, ids[0], grad[0, 3:])
    torch.testing.assert_close(words.weight.grad, expected)
    torch.testing.assert_close(prompt.embedding.weight.grad, grad[0, :3])


def test_trained_copy_of_the_word_embeddings(words, prompt):
    wrapper = ModulesToSaveWrapper(words)
    wrapper.add_adapter("default")
    wrapper.set_adapter("default")
    prompt(torch.tensor([[4, 2]]), wrapper).sum().backward()
    assert wrapper.modules_to_save["default"].weight.grad[[4, 2]].eq(1).all()


def test_word_embeddings_are_called_so_that_hooks_and_scaling_act(words, prompt):
    ids = torch.randint(11, (2, 5))
    words.register_forward_hook(lambda module, args, output: output * 3)
    words.register_forward_hook(lambda module, args, output: output.requires_grad_(True))
    y = prompt(ids, words)
    assert torch.equal(y[:, 3:], 3 * words.weight[ids])
    y.sum().backward()
    assert prompt.embedding.weight.grad.eq(2).all()


def test_only_ids_of_the_text_are_looked_up(prompt):
    words = nn.Embedding(11, 6, max_norm=0.5)
    before = words.weight.clone()
    prompt(torch.tensor([[4, 2]]), words)
    changed = (words.weight != before).any(1).nonzero().flatten().tolist()
    assert changed == [2, 4]


def test_a_row_for_each_submodule_of_which_the_first_are_used(words):
    prompt = PromptEmbedding(3, 6, num_transformer_submodules=2)
    assert prompt.prompt().shape == (6, 6)
    y = prompt(torch.randint(11, (2, 4)), words)
    assert y.shape == (2, 7, 6)
    y.sum().backward()
    assert prompt.embedding.weight.grad.tolist() == [[2.0] * 6] * 3 + [[0.0] * 6] * 3


def test_start_from_tokens(words, prompt):
    prompt.init_from_tokens(torch.tensor([2, 2, 5]), words.to(torch.bfloat16))
    assert torch.equal(prompt.embedding.weight, words.weight[[2, 2, 5]].float())
    assert prompt.embedding.weight.requires_grad


def test_retain_graph_gradcheck_and_no_grad(words, prompt):
    prompt, words, ids = prompt.double(), words.double(), torch.randint(11, (2, 3))

    def call(weight: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(prompt, {"embedding.weight": weight}, (ids, words))

    weight = prompt.embedding.weight.detach().requires_grad_()
    assert torch.autograd.gradcheck(call, (weight,))
    y = call(weight).square().sum()
    first = torch.autograd.grad(y, weight, retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(y, weight)[0])
    with torch.inference_mode():
        assert torch.equal(prompt(ids, words), joined(prompt, words(ids)))


def test_compiles_in_one_graph(words, prompt):
    ids = torch.randint(11, (2, 5))
    compiled = torch.compile(copy.deepcopy(prompt), fullgraph=True, backend="aot_eager")
    y, expected = compiled(ids, words), prompt(ids, words)
    assert torch.equal(y, expected)
    grad = torch.randn_like(y)
    y.backward(grad)
    expected.backward(grad)
    assert torch.equal(compiled.embedding.weight.grad, prompt.embedding.weight.grad)


@pytest.mark.parametrize("ids, embeds", [(None, None), (torch.zeros(1, 2).long(), torch.zeros(1, 2, 6))])
def test_exactly_one_of_ids_and_embeddings(words, prompt, ids, embeds):
    with pytest.raises(ValueError, match="exactly one of them must be given"):
        prompt(ids, words, embeds)


def test_another_width(words):
    with pytest.raises(ValueError, match="token_dim: the prompt has 5 columns, the text's embeddings 6"):
        PromptEmbedding(3, 5)(torch.zeros(1, 2).long(), words)
