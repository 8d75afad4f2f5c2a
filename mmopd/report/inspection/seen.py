"""The prompt exactly as the student and each of its teachers read it. Loads torch and transformers."""

from mmopd.config import Recipe, View
from mmopd.modality import Encoder
from mmopd.modality.registry import shown_items
from mmopd.records import Encoded, Prompt
from mmopd.report.inspection.found import Seen
from mmopd.task.load import load_tasks
from mmopd.teacher.router import find_teachers, load_teachers, references
from mmopd.teacher.view import ViewError, encode_view


class ModelViews:
    """Encodes prompts as a run of the recipe does.

    Raises:
        UserError: the student's folder, the fleet or a task cannot be read.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._tasks = load_tasks()
        fleet = load_teachers(recipe.fleet, recipe.algorithm.objective)
        reference = references(fleet, recipe.algorithm.objective)
        self._fleets = [fleet] if reference is None else [fleet, reference]
        self._encoder = Encoder(recipe.student.model)

    def __call__(self, prompt: Prompt) -> tuple[Seen, ...]:
        """Return the prompt as the student reads it, then as each teacher and each reference of its route does."""
        try:
            encoded = self._encoder.encode(prompt)
        except (ValueError, OSError) as error:
            return (Seen("student", "", (), 0, "", (), str(error)),)
        found = [self._seen("student", "", encoded)]
        for fleet in self._fleets:
            routed = find_teachers(fleet, self._tasks, prompt.task, prompt.modality) if fleet.routes else ()
            for teacher in routed:
                view = changes(teacher.view)
                try:
                    found.append(self._seen(teacher.name, view, encode_view(self._encoder, encoded, teacher.view)))
                except ViewError as error:
                    found.append(Seen(teacher.name, view, (), 0, "", (), str(error)))
        return tuple(found)

    def _seen(self, reader: str, view: str, encoded: Encoded) -> Seen:
        text = self._encoder.tokenizer.decode(encoded.ids, clean_up_tokenization_spaces=False)
        items = tuple(files for _, files in shown_items(encoded.prompt))
        return Seen(reader, view, encoded.ids, len(encoded.expanded), text, items)


def changes(view: View) -> str:
    """Return the keys of a view that are set."""
    return ", ".join(f"{key}: {value!r}" for key, value in view.model_dump(exclude_defaults=True, mode="json").items())
