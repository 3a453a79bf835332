"""Names of version 0.1 that a subclass may still define, and what takes the place of each."""

_TURNS = "Only TurnTaking (sparse_callbacks.lightning.turns) still has it: derive from it."
_LIVES = "Only RestartsOptimizers (sparse_callbacks.core.optimizer_life) still has it: derive from it too."

RENAMED = {
    # hooks
    "update": "Write new_masks(self, step), which returns an Update(masks, figures), and after_update(self, step).",
    "move_masks": "Write new_masks(self, step), whose masks the engine takes.",
    "before_batch": "Write window_start(self, batch).",
    "after_batch": "Write batch_end(self, end).",
    "begin": "Write further_members(self, model, entries) and attach(self, model).",
    "apply_masks": "Write write(self, names, finite).",
    "sanity_end": "Write validation_end(self, metrics, epoch); epoch is None for the trial before training.",
    # facts
    "anchor": "Write first_update.",
    "curves": "Write figure_prefix.",
    "rising": "Nothing took it up: as_schedule(..., rising=True) says it where a method reads its argument.",
    "takes_turns": "Derive from TurnTaking (sparse_callbacks.lightning.turns) instead.",
    "steps_are_announced": "The host says it: announces_steps of sparse_callbacks.core.host.Host.",
    # asked of some methods alone
    "workers": _TURNS,
    "data_epoch": _TURNS,
    "own_state": _TURNS,
    "horizon": _LIVES,
    "shortest_life": _LIVES,
    "optimizer_life": _LIVES,
    "begin_optimizer_life": _LIVES,
    # what a method read and called inside a step
    "names": "The step has it: step.names.",
    "due": "The step has it: step.due.",
    "may_be_due": "The step has it: step.may_be_due.",
    "finite": "The step has it: step.finite.",
    "gradient": "The step has it: step.gradient(name).",
    "mask_gradients": "The step has it: step.mask_gradients().",
    "skip_step": "The step has it: step.replace().",
    # what a method read and called at any time
    "note": "Return self.own_figures(...) from begin_training or batch_end, or in an Update.",
    "full": "The weights have it: weights.all_active(names).",
    "data_pass": "The host has it: host.data_pass(...).",
    "data_states": "The host of TurnTaking has it: turns_host.loader_states().",
    "load_data_states": "The host of TurnTaking has it: turns_host.load_loader_states(states).",
    "average_gradients": "The host of TurnTaking has it: turns_host.average_gradients(on).",
    "_arguments": "Write the property arguments.",
    "_idleness": "The progress has it: progress.why_idle(calendar, length, method, replaces=...).",
    # what the callback called: the engine is an object of its own
    "before_optimizer_step": "The engine does it, Engine.before; a method writes before_step(self, step).",
    "_after_optimizer_step": "The engine does it, Engine.after; a method writes after_step(self, step).",
    "after_backward": "The engine does it, Engine.after_backward; a method says wants_dense_gradients(self, step).",
    "withhold": "The engine does it, Engine.withhold, where a method has called step.replace().",
    "release": "The engine does it, Engine.batch_over; a method writes batch_end(self, end).",
    "rebind": "The engine does it, Engine.rebind, where a method has called host.request_restart().",
    "end": "The engine does it, Engine.unbind.",
    "forget": "The engine does it, Engine.forget.",
    "engine_state": "The engine does it, Engine.state; tensors of a method's own are saved from self.aux.",
    "_load": "The engine does it, Engine.bind; tensors of a method's own are restored into self.aux.",
    "_all_finite": "The engine does it; a method reads step.finite.",
    "_note_active": "The engine does it, with EverActive of sparse_callbacks.core.topology, where explores is True.",
}
"""What takes the place of a name that nothing calls or reads any more, as a sentence."""

READ_BY_USERS_ALONE = {"fraction": "Write fraction_at(self, number)."}
"""What takes the place of a name that a base still has, for users to read, and that no method reads any more."""

NEW_SIGNATURES = {
    "before_step": "step.names, step.due, step.gradient(name), step.mask_gradients() and step.replace() take the place "
    "of self.names, self.due(), self.gradient(name), self.mask_gradients() and self.skip_step()",
    "after_step": "step.due takes the place of self.due(), and the hook returns self.new_masks(step) where an update "
    "falls",
    "new_masks": "step.names and step.number take the place of self.names and self.step, and the hook returns "
    "Update(masks)",
    "new_weights": "the step is its first argument",
    "wants_dense_gradients": "the step is its argument",
    "grow_scores": "the step is its first argument, and step.gradient(name) takes the place of self.gradient(name)",
    "make_calendar": "run.total(), run.epoch() and run.lenient take the place of the three arguments",
    "optimizer_life": "run.total(), run.epoch() and run.lenient take the place of the three arguments",
}
"""What has changed in the signature of a hook that keeps its name."""
