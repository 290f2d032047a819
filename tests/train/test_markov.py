"""Training the correction between slots: what is scored is what decoding draws from, and it moves with the twin."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from orthrus.checkpoints import files
from orthrus.decode.options import Sampling
from orthrus.decode.sampling import Chooser, Context
from orthrus.errors import ConfigError
from orthrus.model.attach import attach, config_of
from orthrus.model.config import OrthrusConfig
from orthrus.model.head import output_head
from orthrus.model.markov import Before, Markov, markov_of
from orthrus.train import anchors, frozen, objective, scoring
from orthrus.train.drafting import drafting
from orthrus.train.loop import train
from orthrus.train.start import load_backbone
from orthrus.train.view import TeacherKeys, ViewTask
from tests.families import perturb, tiny
from tests.train.tiny import drafted, one_row, view_recipe

RANK = 4


def moved(correction: Markov | None) -> Markov:
    """Give a correction something to say."""
    assert correction is not None
    with torch.no_grad():
        correction.before_VR.normal_(generator=torch.Generator().manual_seed(2))
    return correction


@pytest.mark.parametrize("chunk", [3, 100])
def test_scores_are_those_of_shifted_logits(chunk: int) -> None:
    """Loss, chance and agreement slot by slot, whatever the chunks; gradients reach both factors."""
    torch.manual_seed(0)
    M, C, V, R = 7, 5, 11, 4
    head, markov = nn.Linear(C, V), moved(Markov(V, 3, device=torch.device("cpu"), dtype=torch.float32))
    student, teacher = torch.randn(M, C), objective.Teacher(torch.randn(R, C), torch.randint(R, (M,)))
    target, token = torch.randint(V, (M,)), torch.randint(V, (M,))
    scores = objective.chunked(
        objective.forward_kl, student, teacher, target, head=head, before=Before(token, markov), chunk=chunk
    )
    matrix_VV = markov.before_VR @ markov.after_VR.T
    expected = torch.zeros(())
    for slot in range(M):
        q = torch.softmax(head(student[slot]) + matrix_VV[token[slot]], -1)
        p = torch.softmax(head(teacher.hidden_RC[teacher.row_M[slot]]), -1)
        loss = (p * (p.log() - q.log())).sum()
        torch.testing.assert_close(scores.loss_M[slot], loss)
        torch.testing.assert_close(scores.kept_M[slot], q[target[slot]])
        assert bool(scores.agrees_M[slot]) is (int(q.argmax()) == int(target[slot]))
        expected = expected + loss
    factors = list(markov.parameters())
    for own, plain in zip(
        torch.autograd.grad(scores.loss_M.sum(), factors), torch.autograd.grad(expected, factors), strict=True
    ):
        torch.testing.assert_close(own, plain)
        assert own.any()


def test_what_is_scored_is_what_decoding_draws_from(backbone: Path, tmp_path: Path) -> None:
    """Logits that training shifts by the text's tokens are a chain's own, as far as its drafts are the text's.

    Anchors known and blind: a blind block's drafts are chosen when its anchor is there.
    """
    task = ViewTask(view_recipe(backbone, tmp_path / "run", model={"markov_rank": RANK}))
    markov, chooser = moved(markov_of(task.model)), Chooser(Sampling(do_sample=True))
    document, position, token, answer = one_row(task, 60)
    blocks = anchors.sample(
        document, answer, blocks=12, block_length=6, blind_share=0.5, generators=[torch.Generator().manual_seed(0)]
    )
    before = scoring.before(token, blocks, markov, None)
    keys = TeacherKeys(document)
    with torch.no_grad():
        frozen.read(task.model, token, document, position, keys=keys)
        hidden = task._student(keys, token, document, position, blocks, 6)[:, :, :-1]
        scored = blocks.scored_BNJ
        shifted = torch.zeros(*scored.shape, 300)
        shifted[scored] = output_head(task.model)(hidden[scored]) + before.shift(before.token)
        mask = config_of(task.model).mask
        for n, anchor in enumerate(blocks.anchor_BN[0].tolist()):
            first = torch.where(blocks.blind_BN[:, n], mask, token[:, anchor])
            logits = drafted(task.model, token[0, :anchor].tolist(), first)
            # Let each draft but the first be the text's: after it, a chain's scores are those of training.
            for slot in range(int(scored[0, n].sum())):
                past = token[:, anchor + slot]
                context = Context(torch.tensor([0]), torch.tensor([anchor + slot]))
                drafts = chooser.draft(logits[None, slot : slot + 1], context, Before(past, markov))
                assert drafts.scores_BMV is not None
                torch.testing.assert_close(drafts.scores_BMV[0, 0], shifted[0, n, slot], rtol=1e-4, atol=1e-4)


def test_training_moves_twin_and_correction_and_no_other_bit(backbone: Path, tmp_path: Path) -> None:
    """Both factors, under Muon for the twin too; the saved adapter loads back equal."""
    recipe = view_recipe(
        backbone,
        tmp_path / "run",
        model={"markov_rank": RANK},
        optimizer={"name": "muon+adamw", "muon_lr": 0.01},
    )
    task = ViewTask(recipe)
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    assert not before["markov.before_VR"].any()
    assert train(task, recipe).finished
    after = task.model.state_dict()
    moved_names = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved_names == {name for name in after if ".diffusion." in name} | {"markov.before_VR", "markov.after_VR"}
    saved = tmp_path / "run" / "model"
    fresh = attach(AutoModelForCausalLM.from_pretrained(backbone), files.read_config(saved))
    files.load_adapter(fresh, saved)
    assert all(torch.equal(tensor, after[name]) for name, tensor in fresh.state_dict().items())


def test_a_run_without_it_is_what_it_was(backbone: Path, tmp_path: Path) -> None:
    """A first step's loss and the twin's gradients are the same with a correction of zeros, to the bit."""
    found = []
    for rank in (0, RANK):
        task = ViewTask(view_recipe(backbone, tmp_path / "run", model={"markov_rank": rank}))
        loss = task.loss(np.array([0]), step=0)
        loss.total.backward()
        found.append((loss.total.detach(), {name: p.grad for name, p in task.trainable().items()}))
    (plain, expected), (total, gradients) = found
    assert torch.equal(total, plain)
    assert all(torch.equal(gradients[name], gradient) for name, gradient in expected.items())
    assert gradients["markov.before_VR"].any()
    assert not any("markov" in name for name in expected)


def test_a_view_gets_a_correction_when_it_is_trained_further(backbone: Path, tmp_path: Path) -> None:
    """One without begins with zeros; one that has one keeps it; another rank is refused."""
    begun = {}
    for rank in (0, RANK):
        model = attach(AutoModelForCausalLM.from_pretrained(backbone), OrthrusConfig(markov_rank=rank))
        perturb(model)
        if rank:
            moved(markov_of(model))
        begun[rank] = files.save(model, tmp_path / f"begun-{rank}")

    def started(rank: int, wanted: int) -> Markov | None:
        model = {"start_from": str(begun[rank]), "markov_rank": wanted}
        return markov_of(load_backbone(view_recipe(backbone, tmp_path / "run", model=model), torch.device("cpu"))[0])

    assert started(0, 0) is None
    added = started(0, RANK)
    assert added is not None
    assert not added.before_VR.any()
    kept = started(RANK, RANK)
    assert kept is not None
    assert kept.before_VR.any()
    for wanted in (0, RANK + 1):
        with pytest.raises(ConfigError, match=f"markov_rank must be {RANK}, as .*begun-{RANK} has it, found {wanted}"):
            started(RANK, wanted)


@pytest.mark.parametrize(("own", "lent"), [(0, RANK), (RANK, 0), (RANK, 2)])
def test_answers_may_be_drafted_by_a_view_of_another_kind(own: int, lent: int, tmp_path: Path) -> None:
    """The lent view's correction for as long as it drafts, then the model's own, the very parameters."""
    lender = attach(tiny("qwen3"), OrthrusConfig(block_size=4, markov_rank=lent))
    perturb(lender)
    files.save(lender, tmp_path)
    model = attach(tiny("qwen3"), OrthrusConfig(block_size=6, markov_rank=own))
    if own:
        moved(markov_of(model))
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    with drafting(model, str(tmp_path)):
        correction = markov_of(model)
        assert (0 if correction is None else correction.after_VR.shape[1]) == lent
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is p and torch.equal(p, value) for name, (p, value) in before.items())


def test_sharding_has_no_place_for_it(backbone: Path, tmp_path: Path) -> None:
    """Said before anything is loaded."""
    with pytest.raises(ConfigError, match=r"markov_rank must be 0 with run\.sharding = 'fsdp2', found 4"):
        view_recipe(backbone, tmp_path / "run", model={"markov_rank": RANK}, run={"sharding": "fsdp2"})
