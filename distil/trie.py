"""Labels of several tokens as one tree of tokens, whose inner nodes run with the prompt in one forward.

Each node sees the prompt and its own ancestors, and has the position that it would have in its label (tree attention:
Miao et al. 2023, SpecInfer, section 4). Without the tree, each such label takes a separate forward.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from common import InputError, LabelScorer, token_log_probs

if TYPE_CHECKING:
    import numpy as np
    import torch

POSITIONS = 2048  # that go through the head at a time: 128 MiB a tile of the vocabulary
# Fields of configurations that limit how far back some layer looks, in tokens; other kinds of layers are refused.
WINDOWS = ("sliding_window", "sliding_window_size", "window_size", "attention_chunk_size", "local_attention")


@dataclass(frozen=True)
class Trie:
    """Surface forms as a tree, whose root is a prompt's last token.

    tokens, depths: [nodes] of inner nodes but the root, each after its parent; a child of the root has depth 0. sees:
    [nodes, nodes] which nodes are a node's ancestors or itself. parents, targets: [edges] a node's number (0 is the
    root) and a token after it, whose log-probability is wanted. paths: the numbers of each form's edges."""

    tokens: list[int]
    depths: list[int]
    sees: torch.Tensor
    parents: list[int]
    targets: list[int]
    paths: list[list[int]]

    def inputs(self, ids: torch.Tensor, last: tuple, start: int, dtype: torch.dtype) -> tuple[dict[str, Any], tuple]:
        """Return the arguments of a forward of rows and, after their padding, the nodes; and the index of the wanted
        positions in it: `last`, then all nodes.

        ids: [rows, width] tokens after the first `start` ones, which are cached, padded on the right; last: index of
        each row's last token; dtype: of the additive mask [rows, 1, width + nodes, start + width + nodes]."""
        import torch

        (rows, width), nodes, device = ids.shape, len(self.tokens), ids.device
        own, lengths = torch.arange(width, device=device), last[1].to(device) + 1
        sees = torch.zeros(rows, width + nodes, start + width + nodes, dtype=torch.bool, device=device)
        sees[:, :, :start] = True
        sees[:, :width, start : start + width] = own[:, None] >= own
        sees[:, width:, start : start + width] = (own < lengths)[:, None]
        sees[:, width:, start + width :] = self.sees.to(device)
        mask = torch.zeros(sees.shape, dtype=dtype, device=device).masked_fill(~sees, torch.finfo(dtype).min)
        tokens, depths = torch.tensor([self.tokens, self.depths], device=device)
        inputs = {
            "input_ids": torch.cat([ids, tokens.expand(rows, -1)], dim=1),
            "position_ids": start + torch.cat([own.expand(rows, -1), lengths + depths], dim=1),
            "attention_mask": mask[:, None],
        }
        return inputs, (last[0], torch.cat([last[1], torch.arange(width, width + nodes).expand(rows, -1)], dim=1))


@functools.lru_cache(maxsize=8)
def trie_of(forms: tuple[tuple[int, ...], ...]) -> Trie:
    """Return the tree of forms, given as token ids."""
    import torch

    nodes: dict[tuple[int, ...], int] = {(): 0}  # number of a node by its tokens from the root on
    edges: dict[tuple[int, ...], int] = {}
    for ids in forms:
        for size in range(len(ids)):
            nodes.setdefault(ids[:size], len(nodes))
            edges.setdefault(ids[: size + 1], len(edges))
    _, *inner = nodes
    sees = torch.eye(len(inner), dtype=torch.bool)
    for i, node in enumerate(inner):
        if parent := nodes[node[:-1]]:
            sees[i] |= sees[parent - 1]
    return Trie(
        tokens=[node[-1] for node in inner],
        depths=[len(node) - 1 for node in inner],
        sees=sees,
        parents=[nodes[edge[:-1]] for edge in edges],
        targets=[edge[-1] for edge in edges],
        paths=[[edges[ids[: size + 1]] for size in range(len(ids))] for ids in forms],
    )


def check_distinct(labels: Sequence[str], forms: Sequence[list[int]]) -> None:
    """Raise InputError for two labels with the same token ids: no score tells them apart."""
    names: dict[tuple[int, ...], str] = {}
    for label, ids in zip(labels, forms, strict=True):
        if (other := names.setdefault(tuple(ids), label)) is not label:
            raise InputError(f"labels {other!r} and {label!r} have the same tokens; rename one")


class TreeScorer(LabelScorer):
    """`common.LabelScorer` that scores the labels of a batch in one forward, by the `hidden` of its subclass.
    Raises InputError as `check_distinct`."""

    plain = False  # by the model's own logits, whose forward takes no tree
    trees = True

    def __init__(self, *args: Any, **how: Any):
        super().__init__(*args, **how)
        check_distinct([word for words in self.forms.values() for word in words], self.form_ids)

    def form_scores(self, rows: list[list[int]], **how: Any) -> np.ndarray:
        """Return scores [rows, forms] as `LabelScorer.form_scores`; labels of one token alone are scored by that."""
        import numpy as np

        if (trie := self._tree(rows)) is None:
            return super().form_scores(rows, **how)
        log_probs = self._tree_log_probs(trie, rows, **how)
        return np.stack([getattr(log_probs[:, path], self.join)(axis=1) for path in trie.paths], axis=1)

    def _tree(self, rows: list[list[int]]) -> Trie | None:
        """Return the tree of the labels, None where these rows cannot have it or there is nothing to run in it."""
        inner = sum(len(ids) - 1 for ids in self.form_ids)
        if self.plain or not self.trees or len(self.form_ids) < 2 or not 0 < inner < POSITIONS:
            return None
        trie, config = trie_of(tuple(map(tuple, self.form_ids))), self.body.config.get_text_config()
        sizes = [getattr(config, name, None) for name in WINDOWS]
        longest, deepest = max(map(len, rows)), 1 + max(trie.depths)
        # A node's distance from a token is not that in its label, so all of them stay within the smallest window.
        most = min((size for size in sizes if isinstance(size, int) and size > 0), default=longest + len(trie.tokens))
        return trie if longest + len(trie.tokens) <= most and longest + deepest <= self.context else None

    def _tree_log_probs(self, trie: Trie, rows: list[list[int]], adapters: list[str | None]) -> np.ndarray:
        """Return log-probabilities [rows, edges]."""
        import numpy as np

        size, targets = POSITIONS // (1 + len(trie.tokens)), [[[token] for token in trie.targets]]
        parts = []
        for part in (slice(start, start + size) for start in range(0, len(rows), size)):
            hidden = self.hidden(rows[part], 1, adapters[part], trie)
            parts.append(token_log_probs(hidden, self.head, targets, trie.parents)[:, :, 0])
        return np.concatenate(parts)

    def check_tree(self, rows: list[list[int]], limit: float, **how: Any) -> bool:
        """Score the longest label and that of the last node both ways, and return whether no token's log-probability
        differs by more than `limit`. Where one does, `form_scores` no longer runs the tree."""
        import numpy as np

        trie, gaps = self._tree(rows), [0.0]
        if trie is None:
            self.trees = False  # also for rows that are shorter
            return self.plain or not any(ids[1:] for ids in self.form_ids) or len(self.form_ids) < 2
        try:
            log_probs = self._tree_log_probs(trie, rows, **how)
            for path in (max(trie.paths, key=len), max(trie.paths, key=lambda path: trie.parents[path[-1]])):
                ids = [trie.targets[edge] for edge in path]
                own = self.log_probs([row + ids[:-1] for row in rows], [[[token] for token in ids]] * len(rows), **how)
                gaps.append(np.abs(log_probs[:, path] - own[:, :, 0]).max())
        except (RuntimeError, ValueError, TypeError, AttributeError, LookupError):
            gaps.append(np.inf)  # its forward takes no such mask or no positions
        self.trees = not max(gaps) > limit
        return self.trees
