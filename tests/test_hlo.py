"""Counting collectives in the text of compiled programs: real ones of the CPU, and what XLA:TPU writes differently."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxformers as jf
from jaxformers.hlo import Collective, collectives

eight = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight (virtual) devices")
P = PartitionSpec


def compiled(fn, *args, **options) -> str:
    return jax.jit(fn, **options).lower(*args).compile().as_text()


@eight
def test_counts_and_bytes_of_a_real_program():
    mesh = jf.mesh("data=2,tensor=4")
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
    x, w = put(np.ones((8, 16), np.float32), "data"), put(np.ones((16, 32), np.float32), None, "tensor")
    v = put(np.ones((32, 16), np.float32), "tensor", None)
    found = collectives(compiled(lambda x, w, v: (x @ w) @ v, x, w, v), 8)
    # (8 / 2, 16) float32 are summed over four devices: twice 3/4 of 256 bytes
    assert found == {"all-reduce": Collective(1, 2 * 4 * 16 * 4 * 3 / 4)}
    assert collectives(compiled(lambda x: x * 2, x), 8) == {}


@eight
def test_bodies_of_loops_count_as_often_as_they_run():
    mesh = jf.mesh("tensor=8")
    w = jax.device_put(np.ones((5, 16, 16), np.float32), NamedSharding(mesh, P(None, "tensor", None)))
    x = jax.device_put(np.ones((4, 16), np.float32), NamedSharding(mesh, P(None, "tensor")))

    def loop(x, w):
        step = lambda x, w: (jax.lax.with_sharding_constraint(x @ w, NamedSharding(mesh, P(None, "tensor"))), None)
        return jax.lax.scan(step, x, w)[0]

    found = collectives(compiled(loop, x, w), 8)
    assert sum(c.count for c in found.values()) == 5


TPU = """HloModule jit_step, is_scheduled=true

%all-reduce-scatter.7 (input.7: bf16[32000,256]) -> bf16[16016,256] {
  %input.7 = bf16[32000,256]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-reduce.85 = bf16[32032,256]{1,0} all-reduce(%input.7), channel_id=107, replica_groups={{0,1},{2,3}}, to_apply=%add
}

%async_collective_fusion.1 (param_0: bf16[64,64]) -> bf16[64,256] {
  ROOT %all-gather.87 = bf16[64,256]{0,1:T(8,128)(2,1)S(1)} all-gather(%param_0), channel_id=40, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={1}
}

%async_collective_fusion.2 (param_0: bf16[64,64]) -> bf16[64,256] {
  ROOT %all-gather.88 = bf16[64,256]{0,1:T(8,128)(2,1)S(1)} all-gather(%param_0), channel_id=40, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={1}
}

%condition.1 (arg: (s32[], bf16[64,64])) -> pred[] {
  %limit = s32[]{:T(128)} constant(3)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%body.1 (arg: (s32[], bf16[64,64])) -> (s32[], bf16[64,64]) {
  %fusion.1 = bf16[64,256]{1,0} fusion(%x), kind=kCustom, calls=%async_collective_fusion.1
  %fusion.2 = bf16[64,256]{1,0} fusion(%x), kind=kCustom, calls=%async_collective_fusion.2
  %all-reduce.2 = (f32[4]{0}, /*index=1*/f32[2,2]{1,0}) all-reduce(%a, %b), channel_id=3, replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, to_apply=%add
}

%never.1 (arg: f32[8]) -> f32[8] {
  %all-reduce.9 = f32[8]{0} all-reduce(%arg), channel_id=9, replica_groups={{0,1}}, to_apply=%add
}

ENTRY %main.9_spmd (param: bf16[256,64]) -> bf16[16016,256] {
  %while.2 = (s32[], bf16[64,64]) while(%tuple), condition=%condition.1, body=%body.1
  %start = (s32[2,64]{1,0}, s32[2,64]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%p), channel_id=26, source_target_pairs={{0,1},{1,0}}
  %done = s32[2,64]{1,0} collective-permute-done(%start)
  %all-to-all = bf16[4,8]{1,0} all-to-all(%q), replica_groups={}, dimensions={0}
  ROOT %fusion.18 = bf16[16016,256]{1,0} fusion(%scatter), kind=kCustom, calls=%all-reduce-scatter.7, backend_config={"a":[]}
}
"""  # noqa: E501


def test_what_xla_writes_for_tpus():
    found = collectives(TPU, 8)
    assert found == {
        "all-gather": Collective(3, 3 * 64 * 256 * 2 * 3 / 4),  # one transfer, named in two fusions, thrice
        "all-reduce": Collective(3, 3 * 2 * (16 + 16) * 3 / 4),  # a tuple; the group is the first axis of the mesh
        "reduce-scatter": Collective(1, 32032 * 256 * 2 / 2),
        "all-to-all": Collective(1, 64 * 7 / 8),  # an open group: all devices
        "collective-permute": Collective(1, 2 * 64 * 4),
    }


def test_a_program_without_any():
    assert collectives(compiled(jnp.sin, np.ones(3, np.float32))) == {} == collectives("")
