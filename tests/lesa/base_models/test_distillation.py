"""Students: they start as their guided teacher, learn chords of its flow, and leave a pipeline of their own."""

import functools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lesa.base_models import distillation
from lesa.base_models.architectures import architecture_of
from lesa.base_models.distillation import distil
from lesa.base_models.students import STUDENTS, Student
from lesa.base_models.train import train_base

CALLS = {"schnell-digits": (4, 0.75), "lightning-digits": (8, 21 / 22)}  # steps, second noise level


_LONG = pytest.param(STUDENTS["lightning-digits"], id="lightning-digits", marks=pytest.mark.long)


@pytest.fixture(scope="module", params=[pytest.param(STUDENTS["schnell-digits"], id="schnell-digits"), _LONG])
def student(request: pytest.FixtureRequest) -> Student:
    return request.param


@pytest.fixture(scope="module")
def teacher(student: Student, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    train_base(
        student.data_set,
        base_dir=folder / "base",
        scorer_dir=folder / "scorer",
        prompts=prompts(student),
        steps=6,
        batch_size=8,
        learning_rate=2e-3,
        seed=1,
        device="cpu",
        report=lambda step, values: None,
    )
    return folder


def prompts(student: Student) -> list[str]:
    return student.data_set.language.split_prompts()["base"][:12]


def learn(student: Student, teacher: Path, folder: Path, steps: int = 2) -> dict[str, float]:
    return distil(
        student,
        teacher_dir=teacher / "base",
        scorer_dir=teacher / "scorer",
        base_dir=folder,
        prompts=prompts(student),
        steps=steps,
        batch_size=16,
        learning_rate=1e-3,
        seed=5,
        device="cpu",
        report=lambda step, values: None,
    )


def test_schnell_starts_as_its_guided_teacher(tmp_path: Path) -> None:
    """Without a guidance input it is the teacher at its guidance, to rounding."""
    student = STUDENTS["schnell-digits"]
    architecture = architecture_of(student.data_set)
    torch.manual_seed(0)
    pipeline = architecture.build(student.data_set)
    few = student.make(pipeline)
    assert not few.transformer.config.guidance_embeds
    noisy = torch.randn(3, *architecture.latent_shape(student.data_set))
    sigma = torch.tensor([0.9, 0.5, 0.1])
    with torch.no_grad():
        read = architecture.read(pipeline, student.data_set, prompts(student)[:3])
        theirs = architecture.guided(pipeline, student.data_set, noisy, sigma, read, {})
        ours = architecture.velocity(few, student.data_set, noisy, sigma, sigma, read)
        other = architecture.velocity(pipeline, student.data_set, noisy, sigma, torch.ones(3), read)
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert (other - theirs).abs().max() > 1e-4, "guidance matters to the teacher"


def test_the_students_noise_levels_are_its_own_calls(student: Student, teacher: Path) -> None:
    architecture = architecture_of(student.data_set)
    few = student.make(architecture.load(teacher / "base"))
    sigmas = distillation._sigmas(student, few, prompts(student)[0])
    steps, second = CALLS[student.name]
    assert len(sigmas) == steps + 1 and sigmas[0] == 1 and sigmas[-1] == 0
    assert float(sigmas[1]) == pytest.approx(second, abs=1e-4)


def test_trajectories_follow_the_teachers_own_run(student: Student, teacher: Path) -> None:
    """Their end is where the teacher's pipeline ends with many steps from the same noise."""
    architecture = architecture_of(student.data_set)
    pipeline = architecture.load(teacher / "base")
    pipeline.set_progress_bar_config(disable=True)
    few = student.make(pipeline)
    texts = prompts(student)
    with torch.no_grad():
        conditioning = architecture.read(pipeline, student.data_set, [*texts, architecture.promptless])
    states = distillation._trajectories(
        student,
        pipeline,
        conditioning,
        torch.tensor([2, 0]),
        distillation._sigmas(student, few, texts[0]),
        torch.Generator().manual_seed(0),
        lambda step, values: None,
    )
    assert states.shape == (2, student.num_steps + 1, *architecture.latent_shape(student.data_set))
    call = architecture.call(student.data_set) | {"num_inference_steps": 200}
    if not architecture.has_guidance:
        call["negative_prompt"] = [architecture.promptless] * 2
        pipeline.scheduler.register_to_config(shift_terminal=None)  # to zero, as the student's levels go
    end = pipeline(prompt=[texts[2], texts[0]], latents=states[:, 0], output_type="latent", return_dict=False, **call)[
        0
    ]
    moved = (states[:, -1] - states[:, 0]).norm()
    assert (states[:, -1] - end).norm() < 0.03 * moved  # 0.02 of it are the few steps of the trajectories


def test_a_student_is_a_pipeline_and_learns(student: Student, teacher: Path, tmp_path: Path) -> None:
    first = learn(student, teacher, tmp_path / "first")
    assert set(first) == {"chord_loss", "agreement", "teacher_agreement", "teacher_psnr"}
    architecture = architecture_of(student.data_set)
    pipeline = architecture.load(tmp_path / "first")
    teachers = architecture.load(teacher / "base")
    assert pipeline.scheduler.config != teachers.scheduler.config
    assert torch.equal(pipeline.vae.decoder.conv_in.weight, teachers.vae.decoder.conv_in.weight)
    longer = learn(student, teacher, tmp_path / "longer", steps=24)
    assert longer["chord_loss"] < 0.9 * first["chord_loss"]
    learn(student, teacher, tmp_path / "again")
    weights = functools.partial(Path.joinpath, tmp_path)
    name = "transformer/diffusion_pytorch_model.safetensors"
    one, two = load_file(weights("first", name)), load_file(weights("again", name))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_nothing_is_written_where_arguments_or_teacher_are_wrong(
    student: Student, teacher: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with pytest.raises(ValueError, match=r"steps is 0"):
        learn(student, teacher, tmp_path / "out", steps=0)
    with pytest.raises(ValueError, match="run the base stage"):
        learn(student, tmp_path / "nobody", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no pipeline folder: run the base stage of the teacher"):
        learn_from(student, tmp_path / "nobody", teacher / "scorer", tmp_path / "out")
    other = next(each for each in STUDENTS.values() if each is not student)
    with pytest.raises(ValueError, match=rf"reads {student.data_set.name}, {other.name} draws {other.data_set.name}"):
        learn_from(other, teacher / "base", teacher / "scorer", tmp_path / "out")
    card = json.loads((teacher / "base" / "model_index.json").read_text()) | {"_class_name": "WanPipeline"}
    stranger = tmp_path_factory.mktemp("stranger")
    (stranger / "model_index.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match=rf"is a WanPipeline, {student.name} learns from "):
        learn_from(student, stranger, teacher / "scorer", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def learn_from(student: Student, teacher: Path, scorer: Path, folder: Path) -> None:
    distil(
        student,
        teacher_dir=teacher,
        scorer_dir=scorer,
        base_dir=folder,
        prompts=prompts(student),
        steps=1,
        batch_size=2,
        learning_rate=1e-3,
        seed=0,
        device="cpu",
        report=lambda step, values: None,
    )
