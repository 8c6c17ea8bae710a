"""What a conversion will do to each layer, found out before it is done."""

# jax declares some of its types only in part.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import html
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax

from . import formulas, specs
from .api import adapter_of, keywords_of, open_model, sample_shape, sample_unit
from .correspondence import changes_of
from .errors import ConversionError, InteropError, MissingShapeError
from .layout import Crossed, crossed
from .partitioning import check
from .plotting import plot_report
from .registry import Adapter, registry
from .walk import Building, Reading

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Report", "Row", "explain"]

_COLUMNS = ("layer", "source", "target", "how", "shape", "shared", "copied", "what changes")
_RED = ' style="color:firebrick"'


@dataclass(frozen=True)
class Row:
    """One layer of the source.

    Attributes:
        path: where it is, ``model[2]``.
        source, target: the classes, or the names of functions; ``target`` is None if refused.
        how: ``"native"``, a class of the target framework; ``"composite"``, a class of this
            library; ``"function"``, a plain callable; ``"refused"``; or ``"unknown"``, if
            that depends on a layer that was refused.
        changes: what is transposed or moved, one line for each array; and what differs at
            the edge of the inputs.
        shared, copied: bytes of the arrays that are the source's own objects, and that are not.
        shapes: of one example before and after the layer, where they are known.
        problem: why it is refused, or None.

    Example:
        >>> import brainstate, interop
        >>> (row,) = interop.explain(brainstate.nn.Linear(3, 4), to="equinox").rows
        >>> row.target, row.how, row.changes, row.shared, row.copied
        ('Linear', 'native', ('weight: transpose (1, 0)',), 16, 48)
    """

    path: str
    source: str
    target: str | None
    how: str
    changes: tuple[str, ...] = ()
    shared: int = 0
    copied: int = 0
    shapes: tuple[specs.Shape | None, specs.Shape | None] = (None, None)
    problem: InteropError | None = None

    def cells(self, brief: bool = False) -> tuple[str, ...]:
        """The row as text; a brief one has the output's shape only, and not what changes."""
        known = [str(shape) for shape in self.shapes[brief:] if shape is not None]
        what = self.problem.problem if self.problem else "; ".join(self.changes)
        sizes = _size(self.shared), _size(self.copied)
        return (
            self.path,
            self.source,
            self.target or "",
            self.how,
            " -> ".join(dict.fromkeys(known)),
            *sizes,
            "" if brief else what,
        )


@dataclass(frozen=True)
class Report:
    """What :func:`explain` found out. ``print`` it, or show it in a notebook.

    Attributes:
        source, target: the frameworks.
        rows: one for each layer, in order.
        problems: everything that stands in the way, each with ``path`` and ``remedy``.

    Example:
        >>> import brainstate, interop
        >>> interop.explain(brainstate.nn.Linear(3, 4), to="nnx")
        <Report: brainstate -> nnx converts; 1 layer, 64 B shared, 0 B copied>
    """

    source: str
    target: str
    rows: tuple[Row, ...]
    problems: tuple[InteropError, ...]

    @property
    def ok(self) -> bool:
        """Whether the model converts."""
        return not self.problems

    @property
    def shared(self) -> int:
        """Bytes of the arrays that both models will hold."""
        return sum(row.shared for row in self.rows)

    @property
    def copied(self) -> int:
        """Bytes of the arrays that are made anew."""
        return sum(row.copied for row in self.rows)

    @property
    def summary(self) -> str:
        """One line: the verdict and the totals."""
        problems = _count(len(self.problems), "problem")
        verdict = "converts" if self.ok else f"does not convert: {problems}"
        sizes = f"{_size(self.shared) or '0 B'} shared, {_size(self.copied) or '0 B'} copied"
        layers = _count(len(self.rows), "layer")
        return f"{self.source} -> {self.target} {verdict}; {layers}, {sizes}"

    def plot(self, axes: Any = None) -> Any:
        """Draw each layer: the bytes that are shared and copied, what changes, what is refused.

        Args:
            axes: a matplotlib ``Axes`` to draw into; by default a new figure's.

        Returns:
            The ``Axes``.

        Raises:
            MissingDependencyError: matplotlib is not installed (extra ``plot``).

        Example:
            >>> import brainstate, interop
            >>> axes = interop.explain(brainstate.nn.Linear(3, 4), to="equinox").plot()
            >>> [label.get_text() for label in axes.get_yticklabels()]
            ['model  Linear']
        """
        return plot_report(self, axes)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.summary}>"

    def __str__(self) -> str:
        from rich.console import Console  # slow to import

        width = max(60, min(shutil.get_terminal_size().columns, 160))
        console = Console(width=width, color_system=None, force_terminal=False)
        below = [f"- {problem}" for problem in self.problems]
        table = self._table(brief=False)
        if console.measure(table, options=console.options.update(width=10**6)).maximum > width:
            table = self._table(brief=True)
            changed = [row for row in self.rows if row.changes]
            below = [f"  {row.path}  {'; '.join(row.changes)}" for row in changed] + below
        with console.capture() as capture:
            console.print(self.summary, markup=False, highlight=False)
            console.print(table)
            for line in below:
                console.print(line, markup=False, highlight=False)
        return "\n".join(line.rstrip() for line in capture.get().splitlines())

    def _table(self, brief: bool) -> Table:
        from rich.table import Table

        rows = [row.cells(brief) for row in self.rows]
        if not brief:
            refused = [row.problem is not None for row in self.rows]
            rows = [
                (*row[:-1], "see below") if no else row
                for row, no in zip(rows, refused, strict=True)
            ]
        shown = self._shown(rows)
        table = Table(box=None)
        for i in shown:
            table.add_column(_COLUMNS[i], overflow="fold")
        for row in rows:
            table.add_row(*(row[i].replace("[", r"\[") for i in shown))
        return table

    @staticmethod
    def _shown(rows: list[tuple[str, ...]]) -> list[int]:
        """The columns in which some row has something to say."""
        return [i for i in range(len(_COLUMNS)) if i < 4 or any(row[i] for row in rows)]

    def to_markdown(self) -> str:
        """The report for an issue or a pull request."""
        table = [row.cells() for row in self.rows]
        shown = self._shown(table)
        lines = [
            f"**{self.summary}**",
            "",
            f"| {' | '.join(_COLUMNS[i] for i in shown)} |",
            "|---" * len(shown) + "|",
        ]
        for row in table:
            cells = [cell.replace("|", r"\|").replace("\n", " ") for cell in row]
            lines.append(f"| {' | '.join(cells[i] for i in shown)} |")
        if self.problems:
            lines += ["", *(f"- {str(problem)}" for problem in self.problems)]
        return "\n".join(lines) + "\n"

    def _repr_html_(self) -> str:
        shown = self._shown([row.cells() for row in self.rows])
        head = "".join(f"<th>{_COLUMNS[i]}</th>" for i in shown)
        rows = "".join(
            f"<tr{_RED if row.problem else ''}>"
            + "".join(f"<td>{html.escape(row.cells()[i])}</td>" for i in shown)
            + "</tr>"
            for row in self.rows
        )
        problems = "".join(f"<li>{html.escape(str(problem))}</li>" for problem in self.problems)
        return (
            f"<p><b>{html.escape(self.summary)}</b></p>"
            f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
            + (f"<ul>{problems}</ul>" if problems else "")
        )


def explain(
    model: Any, to: str, *, params: Any = None, state: Any = None, sample_input: Any = None
) -> Report:
    """Tell what :func:`convert` will do with each layer, and all that stands in its way.

    Nothing is built: no weight is computed or copied, no random number is drawn, and nothing is
    changed. Each layer of the target is gone through with abstract arrays, and dropped again.
    What moves is found by numbering the elements of one layer at a time.

    Args:
        model: as in :func:`convert`, or a pair: ``(module, variables)`` for Linen, ``(model,
            state)`` for Equinox.
        to: the target framework.
        params, state, sample_input: as in :func:`convert`.

    Returns:
        A :class:`Report`. The problems of a model are in it, and raise nothing.

    Raises:
        ArgumentError: ``model`` is no model, ``to`` is no framework, or ``sample_input`` is no
            shape.
        MissingDependencyError, BrokenDependencyError: a framework cannot be imported.

    Example:
        >>> import brainstate, interop
        >>> stack = brainstate.nn.Sequential(brainstate.nn.Linear(3, 4), brainstate.nn.ReLU())
        >>> report = interop.explain(stack, to="equinox")
        >>> report.ok, [(row.path, row.target, row.how) for row in report.rows]
        (True, [('model[0]', 'Linear', 'native'), ('model[1]', 'relu', 'function')])
    """
    module, keywords = keywords_of(model)
    adapter, target = adapter_of(module), registry.adapter(to)
    shape = sample_shape(sample_input)
    keywords = {"params": params, "state": state} | keywords
    problems: list[InteropError] = []
    fits = True
    try:
        node = adapter.open(module, **keywords)
    except InteropError as e:
        return Report(adapter.name, to, (), (e,))
    try:
        adapter.check(node)
    except ConversionError as e:
        problems.append(e)
        fits = False
    except InteropError:
        pass  # the survey finds it again, with all others
    try:
        if not target.has_partitionings:
            check(adapter, node, target, set())
    except ConversionError as e:
        problems.append(e)
    survey = _Survey(adapter, problems, fits)
    reports: list[Report] = []
    # traced, so that what is moved has a shape, and no values; what is shared stays as it is
    jax.eval_shape(
        lambda: reports.append(
            _surveyed(survey, node, target, shape, sample_unit(sample_input))
        )
    )
    return reports[0]


def _surveyed(
    survey: _Survey, node: Any, target: Adapter, shape: specs.Shape | None, unit: Any
) -> Report:
    """The report on a model that has been opened."""
    adapter, problems, to = survey.adapter, survey.problems, target.name
    spec = survey.read(node, "model")
    try:
        there = crossed(spec, survey.origins, shape, adapter, target)
    except InteropError as e:
        if not problems:
            problems.append(e)
        return Report(adapter.name, to, _unbuilt(spec, survey, problems), tuple(problems))
    trial = _Trial(target, survey, there, unit)
    trial.build(there.spec)
    order = {id(row.problem): i for i, row in enumerate(trial.rows)}
    problems.sort(key=lambda problem: order.get(id(problem), -1))
    return Report(adapter.name, to, tuple(trial.rows), tuple(problems))


@dataclass(frozen=True, eq=False, kw_only=True)
class _Refused(specs.Spec):
    """Stands for a layer that cannot be read; ``error`` is None where that is no news."""

    error: InteropError | None

    @property
    def space(self) -> int | None:
        return None

    def output_shape(self, shape: specs.Shape | None) -> specs.Shape | None:
        return None


class _Survey(Reading):
    """A reading that goes on after a problem."""

    def __init__(self, adapter: Adapter, problems: list[InteropError], fits: bool):
        super().__init__(adapter, registry)
        self.problems, self._fits = problems, fits
        self.nodes: dict[int, Any] = {}

    def read(self, node: Any, path: str, given: frozenset[str] = frozenset()) -> specs.Spec:
        try:
            spec = super().read(node, path, given)
        except InteropError as e:
            is_told = not self._fits and isinstance(e, ConversionError)
            if not is_told:  # with all the weights that do not fit
                self.problems.append(e)
            spec = self._refused(node, path, None if is_told else e)
        except Exception:
            if self._fits:
                raise
            spec = self._refused(node, path, None)
        self.nodes.setdefault(id(spec), node)
        return spec

    def _refused(self, node: Any, path: str, error: InteropError | None) -> specs.Spec:
        found: object = self.adapter.module(node)
        return self._remember(_Refused(error=error), path, type(found))


class _Trial(Building):
    """A building that goes on after a problem, and takes down what became of each layer."""

    def __init__(self, target: Adapter, survey: _Survey, there: Crossed, unit: Any):
        super().__init__(target, survey.origins, there, {}, unit)
        self.rows: list[Row] = []
        self._survey, self._there = survey, there
        self._rowed: set[int] = set()
        self._uses = Counter(map(id, _leaves(there.spec)))
        self._depth = 0

    def build(self, spec: specs.Spec) -> Any:
        if isinstance(spec, specs.Sequential):
            return self._stack(spec)
        if self._depth:  # what a registered layer is built of
            return super().build(spec)
        before, error, built = self._shape_here(), None, None
        self._depth += 1
        try:
            if isinstance(spec, _Refused):
                error = spec.error
            else:
                built = super().build(spec)
        except InteropError as e:
            error = e
        finally:
            self._depth -= 1
        if built is None:
            self.passed(spec)
        self._take_down(spec, built, error, (before, self._shape_here()))
        if built is not None and self._uses[id(spec)] > 1:
            return built  # for what is said of a second use
        self._built[id(spec)] = formulas.identity
        return formulas.identity

    def _stack(self, spec: specs.Sequential) -> Any:
        try:
            return super().build(spec)
        except InteropError as e:
            self._survey.problems.append(e)
            path, found = self._origins[id(spec)]
            self.rows.append(Row(path, found.__qualname__, None, "refused", problem=e))
            return formulas.identity

    def _shape_here(self) -> specs.Shape | None:
        try:
            return self.shape
        except InteropError:
            return None

    def _take_down(
        self, spec: specs.Spec, built: Any, error: InteropError | None, shapes: Any
    ) -> None:
        path, found = self._origins.get(id(spec), ("model", type(spec)))
        source = _name(self._node(spec), found)
        if isinstance(error, MissingShapeError) and self._after_refused():
            error = None
        if built is None:
            how = "refused" if error else "unknown"
            self.rows.append(Row(path, source, None, how, shapes=shapes, problem=error))
            if error is not None and error not in self._survey.problems:
                self._survey.problems.append(error)
        elif id(spec) not in self._rowed:
            self._rowed.add(id(spec))
            target, how = self._target(built)
            changes, sizes = self._arrays(spec, built)
            changes += self._edges(spec, found, how)
            self.rows.append(Row(path, source, target, how, changes, *sizes, shapes))

    def _edges(self, spec: specs.Spec, found: type, how: str) -> tuple[str, ...]:
        """What the layers of both frameworks do unlike each other."""
        source, target = self._survey.adapter, self.adapter
        is_native = found not in source.composites.values()
        here = source.edge(spec) if is_native else spec.edge
        there = target.edge(spec) if how == "native" else spec.edge
        if here == there:
            return ()
        return (f"{source.name}: {here}; {target.name}: {there}",)

    def _after_refused(self) -> bool:
        return self.sample is not None and any(row.target is None for row in self.rows)

    def _target(self, built: Any) -> tuple[str, str]:
        made: object = self.adapter.module(built)
        cls = type(made)
        if not isinstance(made, self.adapter.module_type):
            return _name(made, cls), "function"
        if cls.__module__.startswith(f"{__package__}."):
            return cls.__qualname__, "composite"
        rule = self.adapter.readers.get(cls)
        if rule is not None and rule.spec_type is specs.Function:
            return _name(getattr(made, "fn", made), cls), "function"
        return cls.__qualname__, "native"

    def _node(self, spec: specs.Spec) -> Any:
        """The part of the source that ``spec``, which may have been moved, was read from."""
        original, _ = self._there.origins.get(id(spec), (spec, None))
        return self._survey.nodes.get(id(original))

    def _arrays(self, spec: specs.Spec, built: Any) -> tuple[tuple[str, ...], tuple[int, int]]:
        """What moves, and how many bytes are shared and copied."""
        source, node = self._survey.adapter, self._node(spec)
        if not (_is_module(source, node) and _is_module(self.adapter, built)):
            return (), (0, 0)
        _, made = open_model(self.adapter.close(built, {}))
        given = {id(array) for array in source.arrays(node)}
        held = {id(array): array for array in self.adapter.arrays(made)}
        sizes = [0, 0]
        for array in held.values():
            sizes[id(array) not in given] += array.size * array.dtype.itemsize
        if isinstance(spec, specs.Deferred):
            return ("by registered callbacks",), (sizes[0], sizes[1])
        _, change = self._there.origins.get(id(spec), (spec, None))
        return changes_of(source, node, self.adapter, made, change), (sizes[0], sizes[1])


def _is_module(adapter: Adapter, node: Any) -> bool:
    return isinstance(adapter.module(node), adapter.module_type)


def _leaves(spec: specs.Spec) -> Iterable[specs.Spec]:
    if isinstance(spec, specs.Sequential):
        for layer in spec.layers:
            yield from _leaves(layer)
    else:
        yield spec


def _unbuilt(
    spec: specs.Spec, survey: _Survey, problems: list[InteropError]
) -> tuple[Row, ...]:
    """Rows for a model whose order of axes cannot be worked out."""
    by_path = {problem.path: problem for problem in problems}
    rows: list[Row] = []
    for leaf in _leaves(spec):
        path, found = survey.origins.get(id(leaf), ("model", type(leaf)))
        problem = by_path.get(path)
        source = _name(survey.nodes.get(id(leaf)), found)
        rows.append(
            Row(path, source, None, "refused" if problem else "unknown", problem=problem)
        )
    return tuple(rows)


def _name(part: Any, cls: type) -> str:
    """What users call a layer: a function's own name, or a module's class."""
    part = getattr(part, "func", part)
    return getattr(part, "__name__", cls.__qualname__)


def _size(n: int) -> str:
    for unit in ("B", "KB", "MB"):
        if n < 1000:
            return f"{n:.3g} {unit}" if n else ""
        n = n / 1000  # pyright: ignore[reportAssignmentType]
    return f"{n:.3g} GB"


def _count(n: int, what: str) -> str:
    return f"1 {what}" if n == 1 else f"{n} {what}s"
