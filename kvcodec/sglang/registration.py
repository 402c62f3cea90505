"""A host pool becomes pages of a page store: its kind, its namespace, its spec, one log line."""

from __future__ import annotations

import logging

from kvcodec.errors import ConfigError
from kvcodec.identity import CODEC_POOLS, Namespace
from kvcodec.layout import DType
from kvcodec.sglang.geometry import (
    PoolGeometry,
    class_names,
    describe_pool,
    logical_dtype,
)
from kvcodec.sglang.options import AdapterOptions
from kvcodec.sglang.pools import FlatPages, MappedPages, PoolPages, flat_layout
from kvcodec.sglang.rotation import find_rotary
from kvcodec.sglang.topology import Topology
from kvcodec.spec import CodecSpec
from kvcodec.store import PageStore, Pipeline

__all__ = ["open_pool"]

logger = logging.getLogger(__name__)

_DRAFT_POOLS = frozenset({"draft", "draft_swa"})
_FEW_TOKENS = 16
#: What gives the bytes of a flat page their meaning, in the pools that have it.
_STATE_ATTRIBUTES = (
    "layer_num",
    "num_mamba_layers",
    "temporal_dtype",
    "temporal_state_shape",
    "conv_dtype",
    "conv_state_shapes",
    "item_bytes",
    "indexer_dtype",
)


def open_pool(
    name: str, pool: object, pipeline: Pipeline, topology: Topology, options: AdapterOptions
) -> PoolPages:
    """The pages of a host pool. Raises `ConfigError` for what cannot be stored or honoured."""
    classes = class_names(pool)
    if "MHATokenToKVPoolMXFP8Host" in classes:
        raise ConfigError("kvcodec cannot store MXFP8 pools: SGLang does not show their pages")
    geometry = _geometry(name, pool)
    options = _options_of(name, geometry, options)
    layout = flat_layout(pool) if geometry is None else geometry.layout
    for profile in filter(None, (spec.profile for spec in options.specs)):
        profile.check(layout, is_whole=topology.pp_size == 1)
    shares_pages = topology.shares_pages(name, classes)
    namespace = Namespace(
        topology.identity(options, shares_pages, **_pool_fields(name, pool, geometry)), layout
    )
    store = PageStore(
        pipeline,
        namespace,
        options.spec,
        alternatives=options.alternatives,
        protected_spec=options.protected_spec if options.protects else None,
        rotary=None if name in _DRAFT_POOLS else find_rotary(options, topology.model_name),
    )
    _log(name, pool, store, options)
    is_writer = topology.is_writer(shares_pages)
    if geometry is not None:
        return MappedPages(name, geometry, store, is_writer=is_writer)
    return FlatPages(
        name,
        pool,
        store,
        is_writer=is_writer,
        timeout_seconds=options.store.prefetch_timeout_seconds,
    )


def _geometry(name: str, pool: object) -> PoolGeometry | None:
    """Where the pool's pages lie, None where they have to pass through SGLang's flat form."""
    try:
        geometry = describe_pool(pool)
    except (ConfigError, AttributeError) as error:
        logger.warning(
            "kvcodec: pool %s (%s) is not as expected and is stored raw: %s",
            name,
            type(pool).__name__,
            error,
        )
        return None
    if geometry is None and name in CODEC_POOLS:
        logger.warning(
            "kvcodec: pool %s (%s, layout %s) is not known and is stored raw",
            name,
            type(pool).__name__,
            getattr(pool, "layout", None),
        )
    return geometry


def _options_of(
    name: str, geometry: PoolGeometry | None, options: AdapterOptions
) -> AdapterOptions:
    if geometry is None or name not in CODEC_POOLS:
        return options.as_raw()
    return options.without_layers() if name in _DRAFT_POOLS else options


def _pool_fields(name: str, pool: object, geometry: PoolGeometry | None) -> dict[str, object]:
    """What tells this pool's pages from another's of the same layout.

    The order of axes is no part of it, but where the bytes were not put into our own order.
    """
    fields: dict[str, object] = {
        "pool": name,
        "kv_dtype": logical_dtype(pool).removeprefix("torch."),
        "page_size": getattr(pool, "page_size", 1),
        "format": getattr(pool, "storage_format_tag", None) or "",
    }
    if geometry is None:
        fields["flat"] = f"{type(pool).__name__}/{getattr(pool, 'layout', None)}"
        known = [name for name in _STATE_ATTRIBUTES if hasattr(pool, name)]
        fields["state"] = " ".join(f"{name}={getattr(pool, name)}" for name in known)
    return fields


def _log(name: str, pool: object, store: PageStore, options: AdapterOptions) -> None:
    layout = store.layout
    specs = " or ".join(repr(spec.text) for spec in options.specs)
    if not layout.dtype.is_quantizable and options.spec != CodecSpec():
        logger.info("kvcodec: pool %s holds %s, which is stored raw", name, layout.dtype.text)
    if layout.dtype is DType.U8 and name in CODEC_POOLS:
        logger.warning(
            "kvcodec: the kind of fp8 in pool %s is not known; if you ever change "
            "--kv-cache-dtype, change 'namespace' as well",
            name,
        )
    if name == "kv" and layout.token_count < _FEW_TOKENS and layout.dtype is not DType.U8:
        logger.warning(
            "kvcodec: pages of %d tokens make many small objects; --page-size 64 is usual",
            layout.token_count,
        )
    logger.info(
        "kvcodec: pool %s of %s (%s): %s; namespace %s; %d layers, %d tokens of %s: "
        "%d -> %d bytes a page",
        name,
        type(pool).__name__,
        getattr(pool, "layout", None),
        specs,
        store.namespace.digest.hex(),
        layout.layer_count,
        layout.token_count,
        layout.dtype.text,
        layout.raw_bytes,
        store.plan().page_bytes,
    )
