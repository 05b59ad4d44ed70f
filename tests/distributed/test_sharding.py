"""Parts of arrays: cut, put together again, and named piece by piece; what does not fit is refused by name."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle.distributed import Mesh, MeshError, Sharding
from treadle.distributed.sharding import blocks_of, dim_of, split
from treadle.ir.errors import ShapeError
from treadle.ir.types import TensorType

ENTRIES = [None, "a", "b", "c", ("a", "b"), ("b", "c"), ("a", "c"), ("a", "b", "c"), "a:3", "b:2", ("a", "b:3"),
           ("c:2", "a")]


@st.composite
def arrays(draw):
    """A mesh, an array, and a sharding under which it fits or is padded."""
    mesh = Mesh(dict(zip("abc", draw(st.sampled_from([(2, 2, 2), (2, 3, 1), (3, 2, 2), (4, 1, 2)])))))
    dims, used = [], set()
    for _ in range(draw(st.integers(1, 3))):
        free = [e for e in ENTRIES if not used & set(Sharding((e,)).split_axes)]
        dims.append(draw(st.sampled_from(free)))
        used |= set(Sharding((dims[-1],)).split_axes)
    sharding = Sharding(tuple(dims))
    shape = [draw(st.sampled_from([1, 5, 7, 10, 12, 24, 36])) for _ in dims]
    for i, size in enumerate(shape):
        order = sharding.order(i, mesh)
        if not sharding.fits(i, size, mesh) and not sharding.pads(i, size, mesh):
            shape[i] = int(np.prod([mesh[axis] * blocks for axis, blocks in order])) * draw(st.integers(1, 2))
    return mesh, np.arange(np.prod(shape), dtype=np.int64).reshape(shape), sharding


@given(arrays())
def test_parts_make_the_whole(case):
    mesh, array, sharding = case
    local = sharding.local(TensorType(array.shape, "int64"), mesh)
    parts = [sharding.cut(array, mesh, rank) for rank in range(mesh.size)]
    assert all(p.shape == local.shape for p in parts)
    np.testing.assert_array_equal(sharding.join(parts, mesh, array.shape), array)
    copies = np.zeros(array.shape, int)
    for rank, part in enumerate(parts):
        for own, at in sharding.pieces(mesh, rank, array.shape):
            np.testing.assert_array_equal(part[own], array[at])
            copies[at] += 1
        read = sharding.assemble(mesh, rank, TensorType(array.shape, "int64"), array.__getitem__)
        np.testing.assert_array_equal(read, part)
    split_over = np.prod([mesh[a] for a in sharding.split_axes], dtype=int)
    assert (copies == mesh.size // split_over).all()


def test_the_later_axis_cuts_first():
    mesh, x = Mesh({"data": 2, "tensor": 2}), np.arange(8)
    both = Sharding((("data", "tensor"),))
    assert both == Sharding(("tensor,data",)) and str(both) == "[(data,tensor)]"
    assert [both.cut(x, mesh, rank).tolist() for rank in range(4)] == [[0, 1], [4, 5], [2, 3], [6, 7]]
    blocks = Sharding(("tensor:2",))
    assert blocks.cut(x, mesh, 0).tolist() == [0, 1, 4, 5] and blocks.cut(x, mesh, 1).tolist() == [2, 3, 6, 7]
    place = blocks.placement("tensor")
    assert place == split(0, 2) and (dim_of(place), blocks_of(place)) == (0, 2)
    assert both.placed("data", -1) == Sharding(("tensor",))


def test_what_does_not_fit_is_named():
    mesh = Mesh({"data": 2, "tensor": 4})
    for dims, size, message in [
            (("tensor",), 10, r"dimension 0 of wte.weight \(f32\[10\]\) does not divide over the 4 ranks of 'tensor'; "
                              "nothing is padded: make it 12"),
            (("tensor:3",), 16, "over the 4 ranks of 'tensor' in 3 blocks; nothing is padded: make it 24"),
            ((("data", "tensor"),), 12, "4 ranks of 'tensor' and 2 ranks of 'data'; nothing is padded: make it 16")]:
        with pytest.raises(ShapeError, match=message):
            Sharding(dims).check(TensorType((size,), "float32"), mesh, "wte.weight")
    Sharding(("tensor",)).check(TensorType((10,), "float32"), mesh, padded=True)
    with pytest.raises(ShapeError, match="in 3 blocks; nothing is padded"):
        Sharding(("tensor:3",)).check(TensorType((16,), "float32"), mesh, padded=True)
    with pytest.raises(MeshError, match="split over 'tensor:x'; expected a mesh axis such as 'tensor', or with"):
        Sharding(("tensor:x",))
    with pytest.raises(MeshError, match="not one run; ask for its pieces"):
        Sharding(("tensor:3",)).part(mesh, 0, (24,))
