"""training/distill.py: the divergences against torch's own, what a top-k keeps of them, and a student that follows its teacher."""

import pathlib
from types import SimpleNamespace

import pytest
from tiny_models import PAD, make_rows, save_tiny_base, tiny_settings

from cluster.config import validate
from cluster.errors import ConfigError, TrainingError
from training.distill import DistillConfig, Distiller, StoredDistiller, divergence, sparse_divergence
from training.methods import build_model
from training.objective import answer_loss
from training.packing import collate_padded

torch = pytest.importorskip("torch")
SETTINGS = {"weight": 0.5, "direction": "forward", "temperature": 2.0, "bf16": False}


@pytest.fixture(scope="module")
def logits():
    draw = torch.Generator().manual_seed(3)
    return [torch.randn(5, 11, generator=draw) * 2 for _ in range(2)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return save_tiny_base(tmp_path_factory.mktemp("base"))


def batch_of(count: int) -> dict:
    rows = make_rows(count, seed=6)
    return collate_padded([row["input_ids"] for row in rows], [row["num_prompt"] for row in rows], PAD)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_both_directions_are_torchs_kl(logits, temperature):
    student, teacher = logits
    own, other = ((one / temperature).log_softmax(-1) for one in (student, teacher))
    kl = torch.nn.functional.kl_div
    expected = {"forward": kl(own, other, reduction="none", log_target=True).sum(-1)}
    expected["reverse"] = kl(other, own, reduction="none", log_target=True).sum(-1)
    for direction, value in expected.items():
        torch.testing.assert_close(divergence(student, teacher, direction, temperature), value * temperature**2)
    assert not torch.allclose(expected["forward"], expected["reverse"])
    torch.testing.assert_close(divergence(teacher, teacher, "forward", temperature), torch.zeros(5))


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_student_comes_closer_to_its_teacher(base, tmp_path, direction):
    teacher = save_tiny_base(tmp_path / "teacher", hidden_size=48)
    student = build_model(tiny_settings(base_path=str(base), method="full"))
    settings = {**SETTINGS, "teacher": str(teacher), "direction": direction, "weight": 1.0}
    distiller = Distiller(settings, SimpleNamespace(module=student, device="cpu"))
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    batch = batch_of(6)
    losses = []
    for _ in range(12):
        loss = distiller.loss(student, batch, "cpu")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_a_teacher_that_is_the_student_adds_nothing(base):
    student = build_model(tiny_settings(base_path=str(base), method="full")).eval()
    distiller = Distiller({**SETTINGS, "teacher": str(base)}, SimpleNamespace(module=student, device="cpu"))
    batch = batch_of(4)
    assert distiller.loss(student, batch, "cpu").item() == pytest.approx(
        answer_loss(student, batch, "cpu").item() / 2, abs=1e-5
    )


def test_a_teacher_of_other_tokens_or_none_is_refused(base, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes)).save_pretrained(tmp_path / "other")
    student = SimpleNamespace(module=build_model(tiny_settings(base_path=str(base), method="full")), device="cpu")
    with pytest.raises(
        TrainingError, match="vocabulary of 40 tokens, the base has 61; allowed: a model with the base's own"
    ):
        Distiller({**SETTINGS, "teacher": str(tmp_path / "other")}, student)
    with pytest.raises(TrainingError, match="teacher '.*gone' cannot be loaded"):
        Distiller({**SETTINGS, "teacher": str(tmp_path / "gone")}, student)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_a_few_known_tokens_teach_as_a_dense_vector_that_is_zero_elsewhere(logits, temperature):
    student, teacher = (one.clone().double() for one in logits)
    student.requires_grad_()
    top_logprobs, top_ids = teacher.log_softmax(-1).topk(3)
    top_logprobs = top_logprobs.float()
    top_logprobs[1, 2] = -torch.inf  # a row of which only two are known
    top_logprobs[4] = -torch.inf  # and one of which nothing is
    found = sparse_divergence(student, top_ids, top_logprobs, temperature)
    found.sum().backward()
    gradient, student.grad = student.grad, None
    weights = (top_logprobs.double() / temperature).exp()
    dense = torch.zeros_like(teacher).scatter(1, top_ids, weights)
    dense = dense / dense.sum(-1, keepdim=True).clamp_min(1e-30)
    own = (student / temperature).log_softmax(-1)
    expected = torch.nn.functional.kl_div(own, dense, reduction="none").sum(-1) * temperature**2
    expected.sum().backward()
    torch.testing.assert_close(found, expected.detach().float(), check_dtype=False)
    torch.testing.assert_close(gradient, student.grad, atol=1e-6, rtol=1e-5, check_dtype=False)
    assert found[4] == 0 and not gradient[4].any() and gradient[:4].any(dim=-1).all()


def test_tokens_of_which_nothing_is_known_are_learned_as_they_are(base):
    student = build_model(tiny_settings(base_path=str(base), method="full")).eval()
    batch = batch_of(4)
    num_answers = int((batch["labels"] != -100).sum())
    nothing = {"top_ids": torch.zeros(num_answers, 2, dtype=torch.long)}
    nothing["top_logprobs"] = torch.full((num_answers, 2), -torch.inf)
    distiller = StoredDistiller({"weight": 0.5, "temperature": 1.0})
    hard = answer_loss(student, batch, "cpu").item()
    assert distiller.loss(student, batch, "cpu").item() == pytest.approx(hard)
    assert distiller.loss(student, {**batch, **nothing}, "cpu").item() == pytest.approx(hard)
    known = {name: tensor.clone() for name, tensor in nothing.items()}
    known["top_ids"][0], known["top_logprobs"][0] = torch.tensor([3, 4]), torch.tensor([-0.5, -1.0])
    assert distiller.loss(student, {**batch, **known}, "cpu").item() != pytest.approx(hard)


def test_stored_probabilities_exclude_a_teacher_and_the_reverse_direction():
    assert validate(DistillConfig, {"stored": True}).stored
    with pytest.raises(ConfigError, match="teacher='t' is named too; allowed: one of both"):
        validate(DistillConfig, {"stored": True, "teacher": "t"})
    with pytest.raises(ConfigError, match="direction='reverse' needs all of the teacher's"):
        validate(DistillConfig, {"stored": True, "direction": "reverse"})
