"""Figures of a classifier: accuracy by class, which class is taken for which, and pictures."""

from __future__ import annotations

import math

from distckpt.report.evaluations import EvaluationRecord, Sample
from distckpt.report.markup import Markup, join, tag
from distckpt.wording import count_text

_MOST_BARS = 40
_MOST_CELLS = 30  # classes of a matrix that is drawn cell by cell
_MOST_NUMBERS = 12  # classes of a matrix that has its numbers in the cells
_MOST_PAIRS = 15


def accuracy_bars(record: EvaluationRecord) -> Markup:
    """Return a bar for each class's accuracy; of many classes, for the worst."""
    ranked = [
        (right / total, index)
        for index, (right, total) in enumerate(zip(record.num_right, record.num_samples, strict=True))
        if total
    ]
    if len(ranked) > _MOST_BARS:
        ranked = sorted(ranked)[:_MOST_BARS]
    title = "Accuracy by class" if len(record.classes) <= _MOST_BARS else f"The {_MOST_BARS} hardest classes"
    bars = (_bar(record, index, share) for share, index in ranked)
    return tag("figure", tag("figcaption", tag("h3", title)), tag("ul", *bars, class_="bars"), class_="classes")


def _bar(record: EvaluationRecord, index: int, share: float) -> Markup:
    right, total = record.num_right[index], record.num_samples[index]
    return tag(
        "li",
        tag("span", record.classes[index], class_="name"),
        tag("span", tag("i", style=f"width:{100 * share:.2f}%"), class_="track"),
        tag("b", f"{100 * share:.1f} %"),
        tag("small", f"{right:,} of {total:,}"),
    )


def confusion_figure(record: EvaluationRecord) -> Markup | None:
    """Return which class is taken for which: as a matrix, or, of many classes, the pairs that are mixed up most."""
    if record.confusion is None:
        return None
    caption = tag(
        "figcaption",
        tag("h3", "Confusion"),
        tag("span", "rows: what it is; columns: what it is taken for", class_="note"),
    )
    parts: list[Markup] = []
    if len(record.classes) <= _MOST_CELLS:
        label = "Confusion matrix"
        parts.append(tag("div", _matrix(record), class_="scroll", tabindex="0", role="group", aria_label=label))
    parts.append(_pairs(record))
    return tag("figure", caption, *parts, class_="confusion")


def _matrix(record: EvaluationRecord) -> Markup:
    """Return the matrix as a table whose cells are coloured by their share of the row."""
    confusion = record.confusion or {}
    many = len(record.classes) > _MOST_NUMBERS
    heads = (tag("th", name, scope="col") for name in record.classes)
    rows = []
    for true, name in enumerate(record.classes):
        total = max(1, record.num_samples[true])
        cells = []
        for predicted, other in enumerate(record.classes):
            number = confusion.get((true, predicted), 0)
            share = number / total
            kind = ("hit" if true == predicted else "miss") if number else None
            deep = " deep" if kind and math.sqrt(share) > 0.6 else ""
            cells.append(
                tag(
                    "td",
                    f"{number:,}" if number and not many else "",
                    class_=f"{kind}{deep}" if kind else None,
                    style=f"--v:{100 * math.sqrt(share):.0f}%" if kind else None,
                    title=f"{name} taken for {other}: {number:,} of {total:,}" if number else None,
                )
            )
        rows.append(tag("tr", tag("th", name, scope="row"), *cells))
    head = tag("tr", tag("td"), *heads)
    caption = tag("caption", "Samples by true class (rows) and predicted class (columns)", class_="unseen")
    style = "matrix many" if many else "matrix"
    return tag("table", caption, tag("thead", head), tag("tbody", *rows), class_=style)


def _pairs(record: EvaluationRecord) -> Markup:
    """Return the pairs of classes that are mixed up most."""
    missed = [(number, pair) for pair, number in (record.confusion or {}).items() if pair[0] != pair[1] and number]
    missed.sort(key=lambda one: (-one[0], one[1]))
    if not missed:
        return tag("p", "No class is taken for another.", class_="note")
    items = (
        tag("li", tag("b", record.classes[true]), " taken for ", tag("b", record.classes[predicted]), f": {number:,}")
        for number, (true, predicted) in missed[:_MOST_PAIRS]
    )
    return tag("ol", *items, class_="pairs")


def sheet(record: EvaluationRecord) -> Markup | None:
    """Return the pictures, mistakes first."""
    if not record.samples:
        return None
    mistakes = sum(sample.true != sample.predicted for sample in record.samples)
    hits = "the hits that the model is least sure of" if mistakes < len(record.samples) else None
    wrong = f"{count_text(mistakes, 'mistake')}, the surest first" if mistakes else None
    note = "; then ".join(part for part in (wrong, hits) if part)
    pictures = (_picture(record, sample) for sample in record.samples)
    caption = tag("figcaption", tag("h3", "Samples"), tag("span", note, class_="note"))
    return tag("figure", caption, tag("ul", *pictures, class_="sheet"), class_="samples")


def _picture(record: EvaluationRecord, sample: Sample) -> Markup:
    true, predicted = record.classes[sample.true], record.classes[sample.predicted]
    is_right = sample.true == sample.predicted
    said = f"a {true}, recognised" if is_right else f"a {true}, taken for {predicted}"
    words = tag("b", true) if is_right else join([tag("b", predicted), tag("span", f"is {true}")])
    return tag(
        "li",
        tag("img", src=f"data:image/png;base64,{sample.png}", alt=f"{said}, probability {sample.probability:.2f}"),
        tag("div", words, class_="said"),
        tag("small", f"{100 * sample.probability:.0f} % sure"),
        class_="right" if is_right else "wrong",
    )
