"""Keys and values of the answers under way, without copying them for every token."""

from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):
    """A DynamicLayer with room for `room` further tokens after the prompt, where that would concatenate."""

    def __init__(self, room: int):
        super().__init__()
        self.room, self.prompt = room, 0
        self.buffers: tuple[Tensor, Tensor] | None = None  # of which keys and values are the beginning

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """The new tokens' keys and values [rows, heads, tokens, size] -> those of all tokens so far."""
        before = self.get_seq_length()
        if before == 0:
            self.prompt = key_states.shape[-2]
            return super().update(key_states, value_states)
        if self.buffers is None:
            self.buffers = self._with_room(self.keys), self._with_room(self.values)
        keys, values = self.buffers
        after = before + key_states.shape[-2]
        keys[:, :, before:after], values[:, :, before:after] = key_states, value_states
        self.keys, self.values = keys[:, :, :after], values[:, :, :after]
        return self.keys, self.values

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.buffers = None

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.buffers = None

    def _with_room(self, states: Tensor) -> Tensor:
        rows, heads, tokens, size = states.shape
        buffer = states.new_empty(rows, heads, self.prompt + self.room, size)
        buffer[:, :, :tokens] = states
        return buffer


def roomy_cache(model: nn.Module, room: int) -> DynamicCache:
    """The cache that the model asks for; layers that keep every token have room for `room` new ones."""
    cache = DynamicCache(config=model.config)
    cache.layers = [RoomyLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
