"""The peers of `distill_step.py`: the distillation trainers that people use, as their documentation says to use them.

Imported in each peer's own environment, where only torch, transformers and the peer are.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from benchmarks.common import PeakMemory, Turns, anonymous_bytes

SEQUENCES, LENGTH = 4, 512
LEARNING_RATE, BETAS = 1e-4, (0.9, 0.95)
_TRAINER = ("torch==2.13.0", "transformers==5.23.0", "accelerate==1.15.0", "datasets==5.2.0")
TRL_PACKAGES = ("trl==1.16.0", *_TRAINER)
MODELOPT_PACKAGES = ("nvidia-modelopt==0.47.0", "requests", *_TRAINER)


class Recorder:
    """Seconds and loss of each step, and the peak of RssAnon above the moment it was made (after the imports).

    A step waits for its turn.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.losses: list[float] = []
        self._began = self._cpu_began = 0.0
        self._baseline = anonymous_bytes()
        self._peak = PeakMemory(0.02).__enter__()
        self._turns = Turns()

    def begin(self) -> None:
        self._turns.wait()
        self._began, self._cpu_began = time.perf_counter(), time.process_time()

    def step(self) -> None:
        """A step is over, and with it the next one begins: batches and logging count."""
        self.seconds.append(time.perf_counter() - self._began)
        self.cpu_seconds.append(time.process_time() - self._cpu_began)
        self.begin()

    def result(self, warmup: int) -> dict[str, Any]:
        self._peak.__exit__()
        return {
            "seconds": self.seconds[warmup:],
            "cpu_seconds": self.cpu_seconds[warmup:],
            "warmup_seconds": self.seconds[:warmup],
            "first_loss": self.losses[0],
            "last_loss": self.losses[-1],
            "peak_rss_anon_bytes": self._peak.bytes - self._baseline,
        }


def rows_of(work: Path, steps: int) -> list[Any]:
    """One [B, T] batch of token ids a step."""
    from safetensors.torch import load_file

    ids = load_file(work / "tokens.safetensors")["input_ids"].long()
    return list(ids[: steps * SEQUENCES].reshape(steps, SEQUENCES, LENGTH))


def teacher_of(work: Path) -> str:
    return (work / "teacher.txt").read_text()


def _recorded(trainer: type, recorder: Recorder) -> type:
    """The trainer, which also says each step's loss, and takes the rows in their order."""
    import torch

    class Recording(trainer):  # type: ignore[misc,valid-type]
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            recorder.losses.append((loss[0] if isinstance(loss, tuple) else loss).item())
            return loss

        def _get_train_sampler(self, *_args: Any, **_kwargs: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    return Recording


def _clock(recorder: Recorder) -> Any:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_args: Any, **_kwargs: Any) -> None:
            recorder.begin()

        def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
            recorder.step()

    return Clock()


def _arguments(work: Path, steps: int) -> dict[str, Any]:
    """What both trainers are told."""
    return {
        "output_dir": str(work / "trainer-output"),
        "max_steps": steps,
        "per_device_train_batch_size": SEQUENCES,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "bf16": True,
        "use_cpu": True,
        "optim": "adamw_torch_fused",
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "adam_beta1": BETAS[0],
        "adam_beta2": BETAS[1],
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "seed": 0,
    }


def _models(work: Path) -> tuple[Any, Any]:
    """(teacher in bfloat16, student in float32)."""
    import torch
    from transformers import AutoModelForCausalLM

    teacher = AutoModelForCausalLM.from_pretrained(teacher_of(work), dtype=torch.bfloat16)
    return teacher, AutoModelForCausalLM.from_pretrained(work / "student", dtype=torch.float32)


def trl(work: Path, steps: int) -> Recorder:
    """GKDTrainer, off-policy."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    rows = torch.cat(rows_of(work, steps))
    recorder = Recorder()
    teacher, student = _models(work)

    def collate(records: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids_BT = torch.tensor([record["input_ids"] for record in records])
        ones_BT = torch.ones_like(ids_BT)
        labels_BT = ids_BT.clone()
        labels_BT[:, 0] = -100  # a prompt of one token: every later one is a target, as for the other contenders
        return {
            "input_ids": ids_BT,
            "attention_mask": ones_BT,
            "labels": labels_BT,
            "prompts": ids_BT[:, :1],
            "prompt_attention_mask": ones_BT[:, :1],
        }

    arguments = GKDConfig(
        **_arguments(work, steps),
        lmbda=0.0,
        beta=0.0,
        temperature=1.0,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=LENGTH,
    )
    _recorded(GKDTrainer, recorder)(
        model=student,
        teacher_model=teacher,
        args=arguments,
        train_dataset=Dataset.from_dict({"input_ids": rows.tolist()}),
        data_collator=collate,
        processing_class=AutoTokenizer.from_pretrained(teacher_of(work)),
        callbacks=[_clock(recorder)],
    ).train()
    return recorder


def modelopt(work: Path, steps: int) -> Recorder:
    """KDTrainer of modelopt.torch.distill, logits alone."""
    import torch
    from datasets import Dataset
    from modelopt.torch.distill.plugins.huggingface import KDTrainer
    from transformers import AutoTokenizer, TrainingArguments

    rows = torch.cat(rows_of(work, steps))
    recorder = Recorder()
    teacher, student = _models(work)

    def collate(records: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids_BT = torch.tensor([record["input_ids"] for record in records])
        return {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT), "labels": ids_BT}

    _recorded(KDTrainer, recorder)(
        model=student,
        args=TrainingArguments(**_arguments(work, steps)),
        train_dataset=Dataset.from_dict({"input_ids": rows.tolist()}),
        data_collator=collate,
        processing_class=AutoTokenizer.from_pretrained(teacher_of(work)),
        callbacks=[_clock(recorder)],
        distill_args={"teacher_model": teacher, "temperature": 1.0},
    ).train()
    return recorder
