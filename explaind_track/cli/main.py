"""The command `explaind-track`: runs as they were recorded, while they train and afterwards."""

import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from explaind_track.cli.analyses import audit, explain, prune, similarity
from explaind_track.cli.checkpoints import checkpoints
from explaind_track.cli.common import (
    AS_JSON,
    RUN,
    latest_values,
    local_run,
    open_trajectory,
    report_errors,
    state_of,
    tell,
)
from explaind_track.cli.completion import completion
from explaind_track.cli.demo import demo
from explaind_track.cli.doctor import doctor
from explaind_track.cli.live_view import Follower, follow, view
from explaind_track.cli.report_command import compare, report
from explaind_track.core.tables import inert
from explaind_track.errors import TrajectoryError
from explaind_track.record.files import directory_mb
from explaind_track.record.history import HISTORY
from explaind_track.record.manifest import Manifest
from explaind_track.record.media import is_medium
from explaind_track.record.remote import RemoteArtifact
from explaind_track.record.run_directory import find_runs, read_tie

ADVICE = "Tracker(…, trajectory=DIRECTORY) records one, and `explaind-track demo` makes one"


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="explaind_track")
def main() -> None:
    """Look at recorded training runs, explain them, and bring them to and from Weights & Biases.

    RUN is a directory on this disk: a trajectory, or what holds one as `trajectory/` (a recipe's results, or a run of
    W&B, offline ones included). explain, prune, similarity and verify also take `wandb:entity/project/name:alias`.

    Exit codes: 0 all is well, 1 something is wrong with the run or with W&B, 2 the command was misused.
    """


for command in (audit, checkpoints, compare, completion, demo, doctor, explain, prune, report, similarity):
    main.add_command(command)


@main.command()
@click.argument("root", type=click.Path(exists=True, file_okay=False, path_type=Path), default=".")
@AS_JSON
@report_errors
def runs(root: Path, as_json: bool) -> None:
    """List the runs under ROOT (this directory if not given)."""
    found = []
    for directory in find_runs(root):
        try:
            found.append(_describe_run(directory))
        except (TrajectoryError, OSError) as error:  # a manifest of something else, or a run that has just vanished
            click.echo(inert(f"passed over {os.path.relpath(directory)}: {error}"), err=True)
    tell(as_json, found, "\n".join(map(_line_of, found)) or f"no run under {root}; {ADVICE}")


def _describe_run(directory: Path) -> dict[str, Any]:
    manifest = Manifest.read(directory, missing_ok=True)
    tie = read_tie(directory)
    return {
        "run": os.path.relpath(directory),
        "state": state_of(directory),
        "steps": manifest.steps,
        "mb": round(directory_mb(directory), 1),
        "optimizer": manifest.head.get("optimizer", "").rsplit(".", 1)[-1],
        "wandb": None if tie is None else tie.path,
        "offline": tie is not None and tie.offline,
    }


def _line_of(run: dict[str, Any]) -> str:
    size = f"{run['steps']:>9} steps {run['mb']:>9} MB"
    return f"{size}  {run['optimizer']:8} {run['state']:9} {run['run']}  {run['wandb'] or ''}".rstrip()


@main.command()
@RUN
@click.option("--once", is_flag=True, help="Show it as it is now, and do not follow it.")
@AS_JSON
@report_errors
def show(run: str, once: bool, as_json: bool) -> None:
    """Watch RUN in the terminal, also while it trains.

    Its influences by group, its residual and its speed; as JSON, the latest value of everything.
    """
    directory = local_run(run)
    follower = Follower(directory)
    follower.read()
    if as_json:
        tell(True, {"state": state_of(directory), "row": latest_values(follower.rows)}, "")
        return

    from rich.console import Console

    console = Console()
    if once:
        console.print(view(directory, list(follower.rows), state_of(directory)))
    else:
        follow(directory, console)


@main.command()
@click.argument("name")
@click.argument("directory", type=click.Path(path_type=Path))
@AS_JSON
@report_errors
def pull(name: str, directory: Path, as_json: bool) -> None:
    """Fetch the trajectory NAME from W&B.

    NAME is `[wandb:]entity/project/name:alias`; DIRECTORY, a new one, receives all its files. A pull that breaks off
    goes on where it stopped. To look at a few steps only, open NAME itself: that fetches only what it needs.
    """
    from tqdm import tqdm

    if directory.exists() and any(directory.iterdir()):
        raise TrajectoryError(f"{directory} is not empty; name a new directory")
    remote = RemoteArtifact(name)
    manifest = Manifest.read(remote.manifest_directory())

    for entry in tqdm(manifest.entries, "pull", unit="file", disable=as_json):
        fetched = remote.locate(entry)  # into the cache, which a second try finds
        (directory / entry.path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(fetched, directory / entry.path)
    for path in remote.artifact.manifest.entries:
        if path == HISTORY or is_medium(path):
            remote.artifact.get_entry(path).download(root=str(directory))
    manifest.write(directory)  # last: a trajectory is whole once it has one

    steps = manifest.steps
    tell(as_json, {"directory": str(directory), "steps": steps}, f"{directory} holds {steps} steps of {remote.name}")


@main.command()
@RUN
@click.option("--replay", is_flag=True, help="Take every step again, and compare with every checkpoint, bit for bit.")
@AS_JSON
@report_errors
def verify(run: str, replay: bool, as_json: bool) -> None:
    """Check every file of RUN against the hash it was written with."""
    from tqdm import tqdm

    trajectory = open_trajectory(run)
    entries = trajectory.manifest.entries
    for entry in entries:
        trajectory.file(entry)
    if replay:
        for _ in tqdm(trajectory.steps(), "replay", len(trajectory), unit="step", disable=as_json):
            pass  # the steps themselves compare what they lead to with the checkpoints

    content = {"run": run, "steps": len(trajectory), "files": len(entries), "replayed": replay}
    words = f"{run}: {len(trajectory)} steps in {len(entries)} files, all as they were written"
    tell(as_json, content, words + (", and their replay meets every checkpoint" if replay else ""))


@main.command()
@RUN
@AS_JSON
@report_errors
def sync(run: str, as_json: bool) -> None:
    """Send to W&B what it lacks of RUN.

    Rows, the tables and pictures that they show, and the trajectory, from RUN's own record; nothing twice.
    """
    from explaind_track.wandb_io.sync import sync as sync_run

    done = sync_run(local_run(run), progress=not as_json)
    sent = [f"{done.rows_sent} rows"] if done.rows_sent else []
    sent += [f"{done.media_sent} files that rows show"] if done.media_sent else []
    sent += ["the trajectory"] if done.artifact_sent else []
    words = f"{done.url} has all {done.rows} rows and the trajectory"
    tell(as_json, asdict(done), f"{words}; sent now: {', '.join(sent) or 'nothing, it had them'}")


@main.command()
@click.argument("project", metavar="ENTITY/PROJECT")
@AS_JSON
@report_errors
def workspace(project: str, as_json: bool) -> None:
    """Save our panels as a workspace and as a report at W&B.

    In sections, from what changed to how far to trust it.
    """
    from explaind_track.wandb_io.workspace import save_workspace

    url, report = save_workspace(project)
    tell(as_json, {"url": url, "report": report}, f"workspace {url}\nreport {report}")
