"""Checks for what others build on this library."""

from .linear_solver import LinearSolverReport, check_linear_solver

__all__ = ["LinearSolverReport", "check_linear_solver"]
