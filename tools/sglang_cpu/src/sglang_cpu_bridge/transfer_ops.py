"""SGLang's ``transfer_kv_*`` ops on a CPU: copies of KV rows between "device" and host pools.

The names and keyword arguments are those of ``sgl_kernel.kvcacheio``, which exists for
accelerators only; arguments that tensors make superfluous (sizes, strides) go to ``**_``.
Suffixes give the direction of the layouts, source first:

    lf  layer first   one array per layer, [token, *row]
    pf  page first    [token, layer, *row], or [page, layer, token, *row] with the "direct" ops
    ph  page head     [page, head, token, layer, head_size]

A row is all heads of one token in one layer, for K or for V; in MLA ops it is the latent. Indices
are token slots, one per row copied. Ops that name "layers" in a tensor of uint64 receive the base
address of each layer's array; its rows lie ``item_size`` bytes apart.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor


def _slots(indices: Tensor) -> Tensor:
    return indices.detach().to("cpu", torch.int64)


def _rows_at(address: int, slots: Tensor, row_bytes: int) -> Tensor:
    """A writable uint8 view [max slot + 1, row_bytes] of the memory at ``address``."""
    row_count = int(slots.max()) + 1 if slots.numel() else 0
    memory = (ctypes.c_uint8 * (row_count * row_bytes)).from_address(address)
    return torch.from_numpy(np.ctypeslib.as_array(memory)).view(row_count, row_bytes)


def _read_rows(address: int, slots: Tensor, row_bytes: int, like: Tensor) -> Tensor:
    """The rows at ``slots`` of the array at ``address``, shaped and typed as a row of ``like``."""
    rows = _rows_at(address, slots, row_bytes)[slots]
    return rows.view(like.dtype).view(len(slots), *like.shape)


def _copy_rows(source: Tensor, target: Tensor, source_slots: Tensor, target_slots: Tensor) -> None:
    target[target_slots] = source[source_slots].view(len(source_slots), *target.shape[1:])


def transfer_kv_per_layer(
    src_k: Tensor,
    dst_k: Tensor,
    src_v: Tensor,
    dst_v: Tensor,
    src_indices: Tensor,
    dst_indices: Tensor,
    **_: object,
) -> None:
    """One layer, layer first to layer first."""
    _copy_rows(src_k, dst_k, _slots(src_indices), _slots(dst_indices))
    _copy_rows(src_v, dst_v, _slots(src_indices), _slots(dst_indices))


def transfer_kv_per_layer_mla(
    src: Tensor, dst: Tensor, src_indices: Tensor, dst_indices: Tensor, **_: object
) -> None:
    """One layer of one array, layer first to layer first."""
    _copy_rows(src, dst, _slots(src_indices), _slots(dst_indices))


def transfer_kv_per_layer_mla_pf_lf(
    src: Tensor, dst: Tensor, src_indices: Tensor, dst_indices: Tensor, layer_id: int, **_: object
) -> None:
    """One layer of one array, [token, layer, *row] to layer first."""
    _copy_rows(src[:, layer_id], dst, _slots(src_indices), _slots(dst_indices))


def transfer_kv_per_layer_pf_lf(
    src_k: Tensor,
    dst_k: Tensor,
    src_v: Tensor,
    dst_v: Tensor,
    src_indices: Tensor,
    dst_indices: Tensor,
    layer_id: int,
    **_: object,
) -> None:
    """One layer, [token, layer, *row] to layer first."""
    _copy_rows(src_k[:, layer_id], dst_k, _slots(src_indices), _slots(dst_indices))
    _copy_rows(src_v[:, layer_id], dst_v, _slots(src_indices), _slots(dst_indices))


def transfer_kv_per_layer_ph_lf(
    src_k: Tensor,
    dst_k: Tensor,
    src_v: Tensor,
    dst_v: Tensor,
    src_indices: Tensor,
    dst_indices: Tensor,
    layer_id: int,
    page_size: int,
    **_: object,
) -> None:
    """One layer, page head to layer first."""
    slots = _slots(src_indices)
    page, token = slots // page_size, slots % page_size
    for source, target in ((src_k, dst_k), (src_v, dst_v)):
        target[_slots(dst_indices)] = source[page, :, token, layer_id]


def transfer_kv_all_layer(
    src_k_layers: Tensor,
    dst_k_layers: Tensor,
    src_v_layers: Tensor,
    dst_v_layers: Tensor,
    src_indices: Tensor,
    dst_indices: Tensor,
    item_size: int,
    num_layers: int,
    **_: object,
) -> None:
    """All layers, layer first to layer first, by address."""
    for source, target in ((src_k_layers, dst_k_layers), (src_v_layers, dst_v_layers)):
        transfer_kv_all_layer_mla(source, target, src_indices, dst_indices, item_size, num_layers)


def transfer_kv_all_layer_mla(
    src_layers: Tensor,
    dst_layers: Tensor,
    src_indices: Tensor,
    dst_indices: Tensor,
    item_size: int,
    num_layers: int,
    **_: object,
) -> None:
    """All layers of one array, layer first to layer first, by address."""
    source_slots, target_slots = _slots(src_indices), _slots(dst_indices)
    sources, targets = src_layers.tolist(), dst_layers.tolist()
    for layer_index in range(num_layers):
        source = _rows_at(sources[layer_index], source_slots, item_size)
        target = _rows_at(targets[layer_index], target_slots, item_size)
        target[target_slots] = source[source_slots]


def transfer_kv_all_layer_mla_lf_pf(
    src_layers: Tensor,
    dst: Tensor,
    src_indices: Tensor,
    dst_indices: Tensor,
    item_size: int,
    num_layers: int,
    **_: object,
) -> None:
    """All layers of one array, layer first by address to [token, layer, *row]."""
    source_slots, target_slots = _slots(src_indices), _slots(dst_indices)
    for layer_index, address in enumerate(src_layers.tolist()[:num_layers]):
        like = dst[0, layer_index]
        dst[target_slots, layer_index] = _read_rows(address, source_slots, item_size, like)


def transfer_kv_all_layer_lf_pf(
    src_k_layers: Tensor,
    dst_k: Tensor,
    src_v_layers: Tensor,
    dst_v: Tensor,
    src_indices: Tensor,
    dst_indices: Tensor,
    item_size: int,
    num_layers: int,
    **_: object,
) -> None:
    """All layers, layer first by address to [token, layer, *row]."""
    for layers, target in ((src_k_layers, dst_k), (src_v_layers, dst_v)):
        transfer_kv_all_layer_mla_lf_pf(
            layers, target, src_indices, dst_indices, item_size, num_layers
        )


def transfer_kv_all_layer_lf_ph(
    src_k_layers: Tensor,
    dst_k: Tensor,
    src_v_layers: Tensor,
    dst_v: Tensor,
    src_indices: Tensor,
    dst_indices: Tensor,
    item_size: int,
    num_layers: int,
    page_size: int,
    **_: object,
) -> None:
    """All layers, layer first by address to page head."""
    source_slots, slots = _slots(src_indices), _slots(dst_indices)
    page, token = slots // page_size, slots % page_size
    for layers, target in ((src_k_layers, dst_k), (src_v_layers, dst_v)):
        for layer_index, address in enumerate(layers.tolist()[:num_layers]):
            like = target[0, :, 0, layer_index]
            target[page, :, token, layer_index] = _read_rows(address, source_slots, item_size, like)


def transfer_kv_direct(
    src_layers: Sequence[Tensor],
    dst_layers: Sequence[Tensor],
    src_indices: Tensor,
    dst_indices: Tensor,
    **_: object,
) -> None:
    """Any number of arrays, layer first to layer first."""
    for source, target in zip(src_layers, dst_layers, strict=True):
        _copy_rows(source, target, _slots(src_indices), _slots(dst_indices))


def transfer_kv_per_layer_direct_pf_lf(
    src_ptrs: Sequence[Tensor],
    dst_ptrs: Sequence[Tensor],
    src_indices: Tensor,
    dst_indices: Tensor,
    layer_id: int,
    page_size: int,
    **_: object,
) -> None:
    """One layer, [page, layer, token, *row] to layer first."""
    slots = _slots(src_indices)
    page, token = slots // page_size, slots % page_size
    for source, target in zip(src_ptrs, dst_ptrs, strict=True):
        rows = source[page, layer_id, token]
        target[_slots(dst_indices)] = rows.view(len(slots), *target.shape[1:])


def transfer_kv_all_layer_direct_lf_pf(
    src_ptrs: Sequence[Tensor],
    dst_ptrs: Sequence[Tensor],
    src_indices: Tensor,
    dst_indices: Tensor,
    page_size: int,
    **_: object,
) -> None:
    """All layers, layer first to [page, layer, token, *row]; K layers before V layers."""
    source_slots, slots = _slots(src_indices), _slots(dst_indices)
    page, token = slots // page_size, slots % page_size
    layer_count = len(src_ptrs) // len(dst_ptrs)
    for part, target in enumerate(dst_ptrs):
        for layer_index in range(layer_count):
            rows = src_ptrs[part * layer_count + layer_index][source_slots]
            target[page, layer_index, token] = rows.view(len(slots), *target.shape[3:])


TRANSFER_OPS: dict[str, Callable[..., None]] = {
    op.__name__: op
    for op in (
        transfer_kv_per_layer,
        transfer_kv_per_layer_mla,
        transfer_kv_per_layer_pf_lf,
        transfer_kv_per_layer_mla_pf_lf,
        transfer_kv_per_layer_ph_lf,
        transfer_kv_all_layer,
        transfer_kv_all_layer_mla,
        transfer_kv_all_layer_lf_pf,
        transfer_kv_all_layer_mla_lf_pf,
        transfer_kv_all_layer_lf_ph,
        transfer_kv_direct,
        transfer_kv_per_layer_direct_pf_lf,
        transfer_kv_all_layer_direct_lf_pf,
    )
}
