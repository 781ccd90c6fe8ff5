"""Row keys, and the file that keeps the rows."""

from pathlib import Path

from explaind_track.record import history
from explaind_track.record.media import Table


def test_keys_are_taken_apart_as_they_are_made() -> None:
    row = {
        history.AXIS: 3,
        history.importance_key(history.KERNEL, "decoder"): 1.0,
        history.importance_key(history.KERNEL, history.TOTAL): 1.0,
        history.importance_key(history.KERNEL, "decoder", "other"): 1.0,
        history.change_key(history.section_of_part("regularization"), "decoder"): 1.0,
        history.whole_change_key(): 1.0,
        history.measure_key("query", "accuracy"): 1.0,
        history.residual_key("loss"): 1.0,
        history.NODES: 1,
        history.NONFINITE: 1,
    }
    assert history.keys_by_group(row, history.KERNEL) == {"decoder": "kernel/decoder", "total": "kernel/total"}
    assert history.keys_by_group(row, "loss/reg") == {"decoder": "loss/reg/decoder"}
    assert [key for key in row if history.is_residual(key)] == ["residual/loss"]
    assert [key for key in row if history.is_measure(key)] == ["query/accuracy"]
    assert history.section_of("kernel/decoder") == "kernel"
    assert history.section_of("note") is None


def test_a_step_without_a_finite_gradient_is_not_an_explained_one() -> None:
    assert history.is_explained({history.AXIS: 0, history.residual_key("query"): 0.125})
    assert not history.is_explained({history.AXIS: 1, history.NONFINITE: 2})


def test_rows_are_read_as_they_were_appended_and_cut_by_step(tmp_path: Path) -> None:
    written = history.append_row(tmp_path, {history.AXIS: 0, "a": 1.5, "b": b"png", "c": Table(["d"], [[b"png"]])})
    assert isinstance(written["b"], Path)
    for step in (1, 2):
        history.append_row(tmp_path, {history.AXIS: step, "a": float(step)})
    picture = {"picture": f"media/{written['b'].name}"}
    first = {history.AXIS: 0, "a": 1.5, "b": picture, "c": {"columns": ["d"], "data": [[picture]]}}
    assert history.read_rows(tmp_path)[0] == first
    assert history.steps_logged(tmp_path) == {0, 1, 2}
    history.cut_history(tmp_path, 1)
    assert history.read_rows(tmp_path) == [first]
