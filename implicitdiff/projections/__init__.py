"""Projections: ``projection(v, *parameters)`` is the point of a set that is nearest to v.

Plain functions of tensors, differentiable in v and in every parameter that is a tensor, to every order and under every
transform. They act on the last dimension, on the last two of matrices; dimensions before it are a batch. A parameter
that is one number per system (radius, total, offset) has the shape of the batch; one that is a vector or a matrix has
its own dimensions last, after those of the batch. Either may be shared by all systems, or be a plain number.

At a kink the derivative is that of one side, an element of Clarke's generalised Jacobian: of the side on which the
constraint is active. It is finite everywhere.
"""

from .._cone_projections import positive_semidefinite_cone, second_order_cone
from .._exponential_cone import exponential_cone
from .affine import affine_set, half_space, hyperplane
from .balls import l1_ball, l1_sphere, l2_ball, l2_sphere
from .box_section import box_section
from .boxes import box, hypercube, linf_ball, non_negative
from .kl import kl_birkhoff_polytope, kl_simplex, kl_transport_polytope
from .polyhedron import polyhedron
from .simplices import simplex, sparse_simplex
from .transport import birkhoff_polytope, transport_polytope

__all__ = [
    "affine_set",
    "birkhoff_polytope",
    "box",
    "box_section",
    "exponential_cone",
    "half_space",
    "hypercube",
    "hyperplane",
    "kl_birkhoff_polytope",
    "kl_simplex",
    "kl_transport_polytope",
    "l1_ball",
    "l1_sphere",
    "l2_ball",
    "l2_sphere",
    "linf_ball",
    "non_negative",
    "polyhedron",
    "positive_semidefinite_cone",
    "second_order_cone",
    "simplex",
    "sparse_simplex",
    "transport_polytope",
]
