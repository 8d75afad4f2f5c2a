"""Models of teachers/*.yaml: teachers, their views, and the routes of prompts to them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from mmopd.config.engine import Engine
from mmopd.settings_file import Config, Count, File, Positive, suggest


def check_proxy(url: str) -> None:
    """Check the URL of a proxy; an empty one is fine: none.

    Raises:
        ValueError: it is not `http://HOST:PORT`. A password is refused: files of settings are shared.
    """
    try:
        parts = urlsplit(url)
        good = (parts.scheme, parts.username, parts.path.strip("/"), parts.query) == ("http", None, "", "")
        if url and not (good and parts.hostname and parts.port):
            raise ValueError
    except ValueError:  # also of a port that is no number
        where = url.rpartition("@")[2]
        raise ValueError(f"`proxy` has the form http://HOST:PORT, without user and password; found {where!r}") from None


class Teacher(Config):
    """A teacher that mmopd serves (`model`), or one that runs elsewhere (`endpoints`)."""

    model: Path | None = Field(
        None, description="Folder of a model in Hugging Face format, which mmopd serves. Either this or `endpoints`"
    )
    engine: Engine = Engine()
    replicas: Count = Field(
        1, description="Servers of this teacher, each on its own GPUs. More where scoring is slower than sampling"
    )
    endpoints: tuple[str, ...] = Field(
        (),
        description="Base URLs of vLLM servers that already run elsewhere, such as `http://10.0.0.7:8000`. Either "
        "this or `model`",
    )
    api_key_env: str | None = Field(
        None,
        description="Environment variable that holds the key of these endpoints, so that no key stands in a file. "
        "`null`: they need none",
    )
    proxy: str = Field(
        "",
        description="Proxy through which these endpoints are reached, as `http://HOST:PORT`, for a teacher outside of "
        "a company's network. Empty: they are reached directly; variables such as `http_proxy` are not used",
    )
    adapter: Path | None = Field(
        None,
        description="LoRA folder (peft) on top of `model`. Teachers with the same `model` and different adapters "
        "share its servers",
    )
    view: str = Field(
        "full",
        description="View of a prompt that the teacher gets, unless a route names another: a name of `views`, or "
        "a built-in one. `full` shows all of it",
    )
    weight: float = Field(
        1.0,
        gt=0,
        description="Weight of this teacher in the objective, w_k of Eq. 4. With 1 for all, teachers count alike",
    )
    concurrency: Positive = Field(
        32,
        description="Requests in flight at once, for each rank and replica. 32 keeps a replica busy; lower it where "
        "scores time out",
    )
    timeout: float = Field(
        120.0,
        gt=0,
        description="Seconds in which a score must arrive, retries included; after that the response has no score. "
        "120 suits prompts of a few thousand tokens; raise it for long ones",
    )

    @model_validator(mode="after")
    def _served_or_elsewhere(self) -> Self:
        if (self.model is None) == (not self.endpoints):
            raise ValueError("a teacher has either `model` (served by mmopd) or `endpoints` (running elsewhere)")
        if self.proxy and self.model is not None:
            raise ValueError("`proxy` is for `endpoints`; a server that mmopd starts is reached directly")
        check_proxy(self.proxy)
        if self.adapter is not None and self.model is None:
            raise ValueError("`adapter` goes on top of `model`; a server that runs elsewhere has its adapters already")
        return self


class View(Config):
    """The part of a prompt that a teacher sees. The ids of the response never change, so its log-probs stay aligned."""

    images: Literal["keep", "drop", "blank"] = Field(
        "keep",
        description="Treatment of images and clips: `keep`, `drop`, or `blank`, which replaces each by an even grey "
        "of the same size, so that the prompt keeps its length",
    )
    min_pixels: Positive | None = Field(
        None,
        description="Pixels to which smaller images are enlarged before they are sent. `null` leaves them as they are",
    )
    max_pixels: Positive | None = Field(
        None,
        description="Pixels to which larger images are reduced before they are sent, to save the teacher's time. "
        "`null` leaves them as they are",
    )
    instead: str = Field(
        "",
        description="Text in the place of the images, such as `{caption}`. Fields are the row's extra texts, and "
        "`{answer}`. Empty: none",
    )
    hint: str = Field(
        "",
        description="Text after the question, such as `The answer is {answer}.`, for a teacher that knows more than "
        "the student; the same fields. Empty: none",
    )


class Route(Config):
    """Teachers of the prompts that match globs on task and modality; the first route that matches is used."""

    teacher: str | Mapping[str, Annotated[float, Field(gt=0)]] = Field(
        description="Teacher that scores these prompts; or several with the weights of their log-probs, as `{math: 2,"
        " general: 1}`, which are scaled to sum to 1"
    )
    task: str = Field("*", description="Tasks that the route is for, a glob. `*` matches all")
    modality: str = Field(
        "*", description="Modalities that the route is for (text, image, video), a glob. `*` matches all"
    )
    view: str | None = Field(
        None, description="View of these prompts that the teachers get. `null`: each teacher's own view"
    )

    @property
    def teachers(self) -> Mapping[str, float]:
        """Teacher -> share of its log-probs in the target; the shares sum to 1."""
        weights = {self.teacher: 1.0} if isinstance(self.teacher, str) else self.teacher
        return {name: weight / sum(weights.values()) for name, weight in weights.items()}


class Fleet(File):
    """`teachers/*.yaml`: teachers, the routes to them, and further views."""

    what: ClassVar[str] = "a fleet of teachers"
    use: ClassVar[str] = "`fleet` of a recipe names it, and `mmopd serve {path}` serves it"

    teachers: Mapping[str, Teacher] = Field(description="Teachers of the fleet by name")
    routes: tuple[Route, ...] = Field(
        description="Teachers of each prompt: those of the first route that matches. A prompt that matches none is an "
        "error before any process starts"
    )
    views: Mapping[str, View] = Field({}, description="Views of your own by name, in addition to the built-in ones")

    @model_validator(mode="after")
    def _routes_lead_somewhere(self) -> Self:
        for i, route in enumerate(self.routes):
            if not route.teacher:
                raise ValueError(f"routes.{i}.teacher: names no teacher")
            for name in route.teachers:
                if name not in self.teachers:
                    raise ValueError(f"routes.{i}.teacher: no teacher {name!r}{suggest(name, self.teachers)}")
        return self
