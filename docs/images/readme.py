"""Draws readme.png: the slopes of a validation curve, and what a solution with its gradient costs."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_diabetes
from sklearn.preprocessing import StandardScaler

import implicitdiff as idf

DOCS = Path(__file__).resolve().parents[1]
torch.set_default_dtype(torch.float64)
plt.style.use(DOCS / "pages.mplstyle")
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))

X, y = load_diabetes(return_X_y=True)
X = torch.as_tensor(StandardScaler().fit_transform(X))
y = torch.as_tensor((y - y.mean()) / y.std())
ridge = idf.ArgminLayer(lambda w, p: ((X[:60] @ w - y[:60]) ** 2).mean() + p.exp() * (w**2).sum())


def validation_loss(log_penalty):
    return ((X[60:] @ ridge(torch.zeros(10), log_penalty) - y[60:]) ** 2).mean()


grid = torch.linspace(-6, 1, 100)
losses = torch.func.vmap(validation_loss)(grid)
left.semilogx(grid.exp(), losses, color="C0", label="loss of the solution")
points = torch.linspace(-5.0, 0.6, 5)
slopes, values = torch.func.vmap(torch.func.grad_and_value(validation_loss))(points)
for point, slope, value in zip(points, slopes, values, strict=True):
    reach = torch.tensor([-0.45, 0.45])
    left.plot((point + reach).exp(), value + slope * reach, color="C1", linewidth=2.5)
    left.plot(point.exp(), value, ".", color="C1", markersize=9)
left.plot([], [], color="C1", linewidth=2.5, label="its derivative, one linear solve each")
log_penalty = torch.tensor(-2.0)
for _ in range(6):
    first = torch.func.grad(validation_loss)(log_penalty)
    log_penalty = log_penalty - first / torch.func.grad(torch.func.grad(validation_loss))(log_penalty).abs()
left.plot(log_penalty.exp(), validation_loss(log_penalty), "o", color="C2", label="minimum, by Newton's method")
left.set(xlabel="penalty of the training problem", title="Validation loss of a ridge regression")
left.legend()

rows = json.loads((DOCS / "tables" / "peers.json").read_text())["rows"]
workload = "forward and backward (5000, 1000)"
names = {
    "by hand, LBFGS of torch": "torch, by hand",
    "torchopt, LBFGS of torch": "torchopt",
    "implicitdiff, default (LBFGS, Auto)": "implicitdiff",
    "jaxopt, LBFGS, jitted": "jaxopt, jitted",
}
times = [next(r["seconds"] for r in rows if (r["workload"], r["way"]) == (workload, way)) for way in names]
bars = right.barh(list(names.values()), times, color=["#90909080", "#90909080", "C0", "#90909080"], height=0.6)
right.bar_label(bars, [f"{t:.2f} s" for t in times], color="#808080", padding=4)
right.set(title="Logistic regression, solved and differentiated", xlim=(0, 2.1))
right.set_xlabel("seconds for 5000 × 1000 and a penalty for each weight")
right.grid(axis="y", visible=False)
right.invert_yaxis()
figure.savefig(DOCS / "images" / "readme.png", dpi=150)
