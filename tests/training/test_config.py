"""`RunConfig`: what a YAML file may say, and what it may not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparse_hf.config import SparseConfig
from sparse_hf_training.config import RunConfig
from sparse_hf_training.run_folder import training_arguments

CONFIGS = Path(__file__).parents[2] / "configs"
TRAIN_FILES = sorted((CONFIGS / "train").glob("*.yaml"))
SPARSE_FILES = sorted((CONFIGS / "sparse").glob("*.yaml"))


def test_files_are_there() -> None:
    assert TRAIN_FILES and SPARSE_FILES


@pytest.mark.parametrize("path", TRAIN_FILES, ids=lambda path: path.stem)
def test_train_files_load_and_come_back(path: Path, tmp_path: Path) -> None:
    config = RunConfig.load(path)
    if isinstance(config.sparse, str) and config.sparse.endswith((".yaml", ".json")):
        SparseConfig.from_file(CONFIGS.parent / config.sparse)
    config.save(tmp_path / "again.yaml")
    assert RunConfig.load(tmp_path / "again.yaml") == config


@pytest.mark.parametrize("path", SPARSE_FILES, ids=lambda path: path.stem)
def test_sparse_files_load(path: Path) -> None:
    config = SparseConfig.from_file(path)
    assert SparseConfig.from_dict(config.to_dict()) == config


def test_round_trip_with_overrides(run_yaml: Callable[..., Path], tmp_path: Path) -> None:
    overrides = [
        "masks.mask_learning_rate=1e-3",
        "trainer.learning_rate=2e-5",
        "trainer.warmup_steps=3",
        "data.recall=null",
        "data.text=[{path: a.txt, max_documents: 3}]",
        "evaluation={}",
        "resume=false",
    ]
    config = RunConfig.load(run_yaml(), overrides)
    assert config.masks.mask_learning_rate == 1e-3
    assert config.trainer["learning_rate"] == 2e-5  # YAML reads 2e-5 as text
    assert config.trainer["warmup_steps"] == 3 and config.trainer["use_cpu"] is True
    assert config.data.recall is None and config.data.text[0].max_documents == 3
    assert config.evaluation.text is None and not config.resume
    config.save(tmp_path / "saved.yaml")
    assert RunConfig.load(tmp_path / "saved.yaml") == config
    assert RunConfig.load(tmp_path / "saved.yaml").to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.max_step=3", r"trainer: \['max_step'\] are no arguments of transformers.TrainingArguments"),
        ("trainer.output_dir=x", r"trainer: \['output_dir'\] are no .* or set by the run"),
        ("trainer.load_best_model_at_end=true", "set by the run"),
        ("trainer.train_sampling_strategy=group_by_length", "set by the run"),
        ("trainer.data_seed=1", "set by the run"),
        ("trainer.save_only_model=true", r"trainer: \['save_only_model'\] are no .* or set by the run"),
        ("trainer.ignore_data_skip=true", r"trainer: \['ignore_data_skip'\] are no .* or set by the run"),
        ("trainer.max_steps=0", "trainer.max_steps must be positive"),
        ("trainer.max_steps=null", r"trainer\.max_steps must be of type int, got None"),
        ("trainer.max_steps=many", r"trainer\.max_steps must be of type int, got 'many'"),
        ("trainer.learning_rate=fast", r"trainer\.learning_rate must be of type float, got 'fast'"),
        ("trainer.bf16='false'", r"trainer\.bf16 must be of type bool, got 'false'"),
        ("trainer.gradient_checkpointing=[1]", r"trainer\.gradient_checkpointing must be of type bool, got \[1\]"),
        ("trainer.gradient_accumulation_steps=0", "trainer.gradient_accumulation_steps must be positive, got 0"),
        ("trainer.per_device_train_batch_size=-1", "trainer.per_device_train_batch_size must be positive, got -1"),
        ("trainer.save_steps=-5", "trainer.save_steps must be positive, got -5"),
        ("trainer={}", "trainer.max_steps must be positive"),
        (
            "stage=mask",
            r"config\.yaml\.stage must be one of \['layer_selection', 'head_elimination', .*'sft'\], got 'mask'",
        ),
        ("dtype=fp8", "dtype must be float32, bfloat16 or float16, got 'fp8'"),
        ("sparse={sparse: streeming}", "streeming"),
        ("sparse={window: 3}", r"unknown keys \['window'\]; known"),
        ("sparse=3", r"config\.yaml\.sparse must be a mapping, got 3"),
        ("data.seq_len=1", "data.seq_len must be at least 2"),
        ("data.text=[]", "data.text must name at least one source"),
        ("data.text=[{file: x}]", r"config\.yaml\.data\.text\[0\]: unknown keys \['file'\]; known: .*'path'"),
        ("data.recall.ratio=2", r"data\.recall\.ratio must lie in \[0, 1\], got 2"),
        ("data.recall.tasks=[needles]", "unknown task 'needles'; known tasks"),
        ("data.recall.tasks=[{needles: 3}]", "a recall task is a name or a mapping with `task`"),
        ("evaluation.tasks=[{task: needle, keys: 3}]", "has no option keys; known options"),
        ("evaluation.tasks=[{task: needle, num_needles: '4'}]", "num_needles must be of type int, got '4'"),
        ("evaluation.tasks=[{task: [needle]}]", r"unknown task \['needle'\]; known tasks"),
        ("evaluation.tasks=[{task: needle, 3: 4}]", "has no option 3; known options"),
        ("evaluation.tasks=[needle, {task: needle, num_needles: 4}]", "evaluation.tasks must be different tasks, got"),
        ("evaluation.num_samples=0", "evaluation.num_samples must be positive, got 0"),
        ("masks.end_head_sparsity=1", r"end_head_sparsity must lie in \[0, 1\)"),
        ("masks.clamp_log_alpha=-1", "clamp_log_alpha must be positive, got -1"),
        ("masks.clamp_multipliers=-1", "clamp_multipliers must be positive, got -1"),
        ("masks.schedule=step", "schedule must be one of"),
        ("masks.target=0.5", r"config\.yaml\.masks: unknown keys \['target'\]; known: .*'end_head_sparsity'"),
        ("objective.kl=0", "objective: weights must not be negative and one must be positive"),
        ("objective.temperature=0", "temperature must be positive"),
    ],
)
def test_what_is_not_understood_is_refused(run_yaml: Callable[..., Path], override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunConfig.load(run_yaml(), [override])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "must hold a mapping"),
        ("- a", "must hold a mapping"),
        ("a: [", "cannot be read"),
        ("model: m", r"broken\.yaml: missing keys \['output_dir', 'data'\]"),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        RunConfig.load(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        RunConfig.load(tmp_path / "none.yaml")


def test_workers_that_would_each_read_a_stream_are_refused(run_yaml: Callable[..., Path]) -> None:
    overrides = ["data.text=[{path: a.txt, streaming: true}]", "trainer.dataloader_num_workers=2"]
    with pytest.raises(ValueError, match="dataloader_num_workers=2 would read all of a streamed source; set 0 or 1"):
        RunConfig.load(run_yaml(), overrides)
    assert RunConfig.load(run_yaml(), [overrides[0], "trainer.dataloader_num_workers=1"])


def test_trainer_arguments_win_over_defaults(run_yaml: Callable[..., Path], tmp_path: Path) -> None:
    def given(*overrides: str) -> Any:
        return training_arguments(RunConfig.load(run_yaml(), overrides), tmp_path)

    assert given().save_total_limit == 2 and given("trainer.save_total_limit=5").save_total_limit == 5
    assert given().ddp_find_unused_parameters is None and given().disable_tqdm
    assert given("trainer.adam_epsilon=1e-6").adam_epsilon == 1e-6
    assert given("trainer.save_strategy=no").save_strategy == "no"  # YAML reads no as false
    with pytest.raises(ValueError, match="sometimes"):
        given("trainer.save_strategy=sometimes")
