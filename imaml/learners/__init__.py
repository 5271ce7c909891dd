"""Meta-learning algorithms: what the parameters of a task are, and what that says of the meta-parameters.

Each learner adapts the model's parameters θ to the support set of a task, φ(θ), and is trained by the loss of φ(θ) on
the query sets, whose gradient in θ is what the algorithms differ in. A batch of tasks is one vmapped computation.
"""

from .imaml import IMAML
from .learner import Learner, MetaLoss
from .maml import MAML
from .regularization import LearnedRegularization
from .reptile import Reptile

__all__ = ["IMAML", "MAML", "LearnedRegularization", "Learner", "MetaLoss", "Reptile"]
