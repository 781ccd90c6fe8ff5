"""Audits of a run while it trains: now and then a step is recomputed the slow and plain way, and compared."""

import warnings
from collections.abc import Mapping

from torch import nn

from explaind_track.analysis.step_audit import audit_step
from explaind_track.core.groups import Groups
from explaind_track.core.queries import Query
from explaind_track.core.step import Step
from explaind_track.engine.batch_losses import SampleLoss
from explaind_track.errors import AuditWarning


class LiveAudit:
    """Audits steps on the first query, and warns of what differs."""

    def __init__(
        self, model: nn.Module, queries: Mapping[str, Query], groups: Groups, sample_loss: SampleLoss | None
    ) -> None:
        """sample_loss: of samples that are recomputed too; None: none are. Raises ValueError without a query."""
        if not queries:
            raise ValueError("audit_every= audits the first of the queries, and there is none: pass queries=")
        self._model, self._query, self._sample_loss = model, next(iter(queries.values())), sample_loss
        self._groups = {name: list(members) for name, members in groups.items()}

    def look(self, step: Step) -> None:
        """step: in tensors of its own."""
        found = audit_step(step, self._model, self._query, groups=self._groups, sample_loss=self._sample_loss)
        if not found.ok:
            worst = max(found.wrong, key=lambda finding: finding.difference)
            names = ", ".join(finding.what for finding in found.wrong[:5])
            warnings.warn(
                f"at step {step.number}, {len(found.wrong)} of {len(found.findings)} audited numbers are not those of "
                f"a plain recomputation ({names}): '{worst.what}' is {worst.ours:.4g}, and {worst.plain:.4g} with "
                "ordinary autograd. Look at the whole table with explaind_track.audit(tracker, model, query, step=…)",
                AuditWarning,
                stacklevel=2,
            )
