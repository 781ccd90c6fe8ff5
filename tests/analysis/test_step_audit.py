"""The audit: right numbers pass, wrong ones are found, and its plain half knows nothing of the package."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from jobs import ROOT, make_job, sample_loss
from torch import Tensor, nn

from explaind_track import Query, Tracker, Trajectory, audit
from explaind_track.analysis import step_audit
from explaind_track.engine import per_sample
from explaind_track.errors import AuditWarning

ALONE = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("plain_step", sys.argv[1])
plain_step = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plain_step)
assert not [name for name in sys.modules if name.startswith("explaind_track")]
print(len(plain_step.quadrature(3)))
"""


def test_the_plain_half_stands_alone() -> None:
    path = ROOT / "explaind_track" / "analysis" / "plain_step.py"
    done = subprocess.run([sys.executable, "-c", ALONE, str(path)], capture_output=True, text=True, check=False)
    assert done.stdout == "3\n", done.stderr


@pytest.fixture
def recorded(tmp_path: Path) -> tuple[Any, Tracker, Path]:
    job = make_job()
    tracker = job.tracker(trajectory=tmp_path / "t")
    job.run(tracker, 4)
    return job, tracker, tmp_path / "t"


def test_a_right_run_passes(recorded: tuple[Any, Tracker, Path]) -> None:
    job, tracker, directory = recorded
    options: dict[str, Any] = {"sample_loss": sample_loss, "data": lambda index: (job.x[index], job.y[index])}
    live = audit(tracker, job.model, job.queries["query"], step=2, samples=3, targets=5, **options)
    assert live.ok, str(live)
    assert {"prediction before", "prediction after", "influence of parameters", "gradient of the batches"} <= {
        finding.what for finding in live.findings
    }
    assert len([finding for finding in live.findings if finding.what.startswith("sample ")]) == 3

    tracker.finish()
    for query in job.queries.values():
        found = audit(Trajectory.open(directory), job.model, query, **options)
        assert (found.ok, found.step) == (True, 3), str(found)
        assert "all as it should be" in str(found)


def test_wrong_samples_are_found(recorded: tuple[Any, Tracker, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    job, tracker, _ = recorded
    tracker.finish()
    right = per_sample.PerSampleGradients.products

    def wrong(self: Any, *arguments: Any, **named: Any) -> Tensor:
        return right(self, *arguments, **named) * 1.01

    monkeypatch.setattr(per_sample.PerSampleGradients, "products", wrong)
    options: dict[str, Any] = {"sample_loss": sample_loss, "data": lambda index: (job.x[index], job.y[index])}
    found = audit(tracker, job.model, job.queries["query"], **options)
    assert not found.ok
    assert all(finding.what.startswith("sample ") for finding in found.wrong)
    assert "WRONG" in str(found)


def test_other_samples_than_training_saw_are_found(recorded: tuple[Any, Tracker, Path]) -> None:
    job, tracker, _ = recorded
    tracker.finish()
    shifted = {"sample_loss": sample_loss, "data": lambda index: (job.x[index] + 1, job.y[index])}
    with pytest.warns(UserWarning, match="do not add up"):
        found = audit(tracker, job.model, job.queries["query"], **shifted)
    assert "gradient of the batches" in {finding.what for finding in found.wrong}


def test_a_tracker_audits_itself_and_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job()
    job.run(job.tracker(audit_every=2), 3)  # warnings are errors

    monkeypatch.setattr(step_audit, "gauss_legendre", lambda nodes: ((0.5, 1.01),))
    job = make_job()
    with pytest.warns(AuditWarning, match=r"at step 0, .* are not those of a plain recomputation \(kernel through"):
        job.run(job.tracker(audit_every=2), 1)


def test_what_cannot_be_audited_is_said(recorded: tuple[Any, Tracker, Path]) -> None:
    job, tracker, _ = recorded
    query = job.queries["query"]
    with pytest.raises(ValueError, match="step=4 is not within the run, which has the steps 0 to 3"):
        audit(tracker, job.model, query, step=4)
    with pytest.raises(ValueError, match="model is not the one"):
        audit(tracker, nn.Linear(4, 3), query)
    with pytest.raises(ValueError, match="pass data="):
        audit(tracker, job.model, query, sample_loss=sample_loss)
    tracker.finish()
    with pytest.raises(ValueError, match="records nothing"):
        audit(make_job().tracker(), job.model, query)


def test_targets_are_spread(recorded: tuple[Any, Tracker, Path]) -> None:
    job, tracker, _ = recorded
    one = audit(tracker, job.model, Query.outputs(job.x), targets=1)
    assert one.ok
    tracker.finish()
