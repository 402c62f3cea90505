"""Where this process stands among SGLang's ranks, and whose pages it therefore shares."""

from __future__ import annotations

from dataclasses import dataclass

from kvcodec.errors import ConfigError
from kvcodec.identity import Identity
from kvcodec.sglang.options import AdapterOptions

__all__ = ["Topology"]

#: Pools of which every tensor-parallel rank holds the same bytes where the KV itself is replicated.
_REPLICATED_NAMES = frozenset({"kv", "indexer", "draft_indexer"})
_REPLICATED_PREFIX = "deepseek_v4_"
_REPLICATED_CLASS = "MLATokenToKVPoolHost"


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """The parts of SGLang's HiCacheStorageConfig that matter; older releases lack some of them."""

    model_name: str
    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    cp_rank: int = 0
    cp_size: int = 1
    is_replicated: bool = False
    has_metrics: bool = False

    @classmethod
    def of_config(cls, config: object, options: AdapterOptions) -> Topology:
        """Read a HiCacheStorageConfig. Raises `ConfigError` for what kvcodec does not support."""

        def number(name: str, default: int) -> int:
            return int(getattr(config, name, default))

        topology = cls(
            model_name=getattr(config, "model_name", None) or "",
            tp_rank=number("tp_rank", 0),
            tp_size=number("tp_size", 1),
            pp_rank=number("pp_rank", 0),
            pp_size=number("pp_size", 1),
            cp_rank=number("attn_cp_rank", 0),
            cp_size=number("attn_cp_size", 1),
            is_replicated=bool(getattr(config, "is_mla_model", False)),
            has_metrics=bool(getattr(config, "enable_storage_metrics", False)),
        )
        if not (topology.model_name or options.namespace):
            raise ConfigError(
                "SGLang gives no model name, so pages of different models would look alike: "
                "set 'namespace' or --served-model-name"
            )
        if number("dcp_size", 1) > 1:
            raise ConfigError(
                f"decode context parallelism is {number('dcp_size', 1)}; kvcodec supports 1"
            )
        lcm = getattr(config, "tp_lcm_size", None)
        if getattr(config, "should_split_heads", False) or (lcm and lcm != topology.tp_size):
            raise ConfigError(
                f"tp_lcm_size is {lcm} with {topology.tp_size} tensor-parallel ranks; kvcodec does "
                "not split heads, so ranks of another count cannot share pages: leave it out"
            )
        return topology

    def shares_pages(self, pool_name: str, class_names: frozenset[str]) -> bool:
        """Whether all tensor-parallel ranks hold the same pages of this pool.

        In doubt they do not: a page is then missed, not mistaken for another rank's.
        """
        return self.is_replicated and (
            pool_name in _REPLICATED_NAMES
            or pool_name.startswith(_REPLICATED_PREFIX)
            or _REPLICATED_CLASS in class_names
        )

    def is_writer(self, shares_pages: bool) -> bool:
        """Whether this rank stores pages, or leaves that to the one rank that does for all."""
        return not shares_pages or self.tp_rank == 0

    def identity(self, options: AdapterOptions, shares_pages: bool, **pool: object) -> Identity:
        """The identity of a pool's pages; `pool` holds the fields that describe the pool itself."""
        fields: dict[str, object] = {
            "engine": "sglang",
            "model": self.model_name,
            "namespace": options.namespace,
            "revision": options.revision,
            "salt": options.salt_digest,
            "pp": f"{self.pp_rank}/{self.pp_size}",
            "cp": f"{self.cp_rank}/{self.cp_size}",
            "tp": "all" if shares_pages else f"{self.tp_rank}/{self.tp_size}",
        }
        return Identity.of(**fields, **pool)
