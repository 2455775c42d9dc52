"""What is chosen for one PULL: its profile, how it is cut, how its rest is coded, and whether the link is probed."""

from dataclasses import dataclass, replace
from typing import Final

from kvserve_api.latency import Link
from kvserve_connector.chunks import Chunk
from kvserve_connector.claims import Claim
from kvserve_connector.commands import Pull
from kvserve_connector.course import Rest
from kvserve_connector.cutting import Cutter
from kvserve_connector.form import Form
from kvserve_connector.links import LinkBook
from kvserve_connector.midway import by_merit, follows
from kvserve_connector.selector import Choice, Selector

FASTER: Final = 16.0
"""A link is worth a probe if one so many times faster would get another profile."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What was asked for, by whom, and of which prefill.

    Attributes:
        peer: The consumer's address.
        pull: Its words.
        claim: Its hold on the prefill.
    """

    peer: str
    pull: Pull
    claim: Claim


class Choices:
    """Chooses for transfers, by the table in force and what is known of link and coders; safe from any thread.

    Args:
        form: What the cache holds.
        selector: What decides the profile.
        links: What is known of the consumers.
        cutter: What cuts transfers into chunks.
    """

    def __init__(self, form: Form, selector: Selector, links: LinkBook, cutter: Cutter) -> None:
        self._form = form
        self._selector = selector
        self._links = links
        self._cutter = cutter

    def choose(self, asked: Asked, *, guess: bool = False, faster: float = 1.0) -> Choice:
        """Choose for a transfer.

        Args:
            asked: What was asked for.
            guess: Only ask what would be chosen now: nothing is remembered.
            faster: What the link's goodput is multiplied by.
        """
        link = self._known(asked)
        if faster != 1.0:
            link = replace(link, bytes_per_s=faster * link.bytes_per_s)
        return self._selector.choose(
            asked.claim.prefill.workload,
            native_bytes=self._form.native_bytes(asked.pull.tokens),
            link=link,
            chunks=len(self._cutter.plan(asked.pull.tokens, kept=asked.claim.kept)),
            stages=asked.pull.stages,
            bundles=asked.pull.bundles,
            peer=asked.peer,
            guess=guess,
        )

    def choose_rest(self, asked: Asked, spent_s: float, rest: Rest) -> Choice | None:
        """Choose again for what nobody has begun to code; see `kvserve_connector.midway`.

        Args:
            asked: What was asked for.
            spent_s: Seconds of the deadline that have passed.
            rest: What is left of the transfer.
        """
        layers = [part.layout.layers for part in self._form.parts]
        return self._selector.choose_rest(
            asked.claim.prefill.workload,
            before=rest.before,
            before_bytes_per_s=rest.before_bytes_per_s,
            native_bytes=rest.native_bytes,
            link=self._known(asked),
            chunks=len(rest.chunks),
            follows=lambda pipeline: follows(pipeline.layer_step, layers, rest.chunks),
            spent_s=spent_s,
            stages=asked.pull.stages,
            bundles=asked.pull.bundles,
            peer=asked.peer,
        )

    def plan(self, asked: Asked, choice: Choice) -> tuple[Chunk, ...]:
        """Cut a transfer, so that the rest can be coded otherwise, if it may be."""
        pull, kept = asked.pull, asked.claim.kept
        multiple, fine = choice.pipeline.layer_step, False
        if pull.takes_parts and by_merit(choice.selection):
            workload = asked.claim.prefill.workload
            steps = self._selector.layer_steps(workload, pull.stages, pull.bundles)
            multiple = self._cutter.multiple(multiple, steps, kept=kept)
            fine = self._selector.has_deadline(workload)
        return self._cutter.plan(pull.tokens, kept=kept, layer_multiple=multiple, fine=fine)

    def wishes_probe(self, asked: Asked, choice: Choice) -> bool:
        """Wish for a probe, if the link may be so much faster, unseen, that another profile would be better now.

        Args:
            asked: What was asked for, and has been sent.
            choice: What was chosen for it.

        Returns:
            Whether the consumer is to be told.
        """
        link = self._links.link(asked.peer)
        if not (asked.pull.takes_probes and by_merit(choice.selection) and link.unsure):
            return False
        now, then = (self.choose(asked, guess=True, faster=faster) for faster in (1.0, FASTER))
        if now.selection.profile == then.selection.profile:
            return False
        link.wish_probe()
        return True

    def _known(self, asked: Asked) -> Link:
        """Return what is known now of the way to a consumer."""
        return self._links.link(asked.peer).snapshot(
            self._selector.prior_bytes_per_s,
            self._links.coders,
            asked.pull.decode_delays,
            hidden_s=asked.claim.left_s,
        )
