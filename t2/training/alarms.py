"""Alarms for a collapsing policy: entropy that falls too low, or KL to the base that grows too high."""

from __future__ import annotations

from dataclasses import dataclass

from t2.training.checkpoint import State


@dataclass(frozen=True)
class AlarmMonitor:
    """Alarms on entropy and KL, at most one every `patience` steps.

    entropy: minimum share of its first value. kl: maximum nats per token above its first value.
    """

    entropy: float
    kl: float
    patience: int = 5

    def alarm(self, state: State, entropy: float | None, kl: float | None) -> str | None:
        """Cause of an alarm after a step, or None; records the first entropy and KL and the alarm in the state."""
        if entropy is not None and state.first_entropy is None:
            state.first_entropy = entropy
        if kl is not None and state.first_kl is None:
            state.first_kl = kl
        if state.last_alarm >= 0 and state.step - state.last_alarm < self.patience:
            return None
        cause = None
        if entropy is not None and state.first_entropy and entropy < self.entropy * state.first_entropy:
            cause = f"entropy {entropy:.3g} nats a token, {entropy / state.first_entropy:.0%} of its first value"
        elif kl is not None and kl > self.kl + (state.first_kl or 0.0):
            cause = f"KL to the base {kl:.3g} nats a token, over {self.kl:g} above its first value"
        if cause is not None:
            state.last_alarm = state.step
        return cause
