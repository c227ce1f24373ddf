"""Where a run's models lie, from its settings: what every stage asks first."""

from __future__ import annotations

from pathlib import Path

from compress.config import CompressConfig
from compress.folders import teacher_folder


def teacher_of(config: CompressConfig) -> Path:
    """The teacher's local folder. Raises ArtifactError or ConfigError as `folders.teacher_folder` does."""
    teacher = config.teacher
    cache = Path(config.cache_dir).expanduser()
    return teacher_folder(teacher.path, teacher.revision, cache, teacher.trust_remote_code)


def student_of(config: CompressConfig, run_dir: Path) -> Path:
    """The untrained student: distill.init_from, one pruned elsewhere, or else this run's own."""
    elsewhere = config.distill.init_from
    return Path(elsewhere).expanduser() if elsewhere else run_dir / "prune"
