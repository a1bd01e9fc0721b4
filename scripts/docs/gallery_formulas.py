r"""The formula of each optimizer in LaTeX, for the gallery.

The letters are those of the docstrings: parameters x, gradient g, step t = 1, 2, ... An optimizer
without a formula here is shown with the block of code in its docstring.
"""

from collections.abc import Mapping
from types import MappingProxyType

_MOMENTS = (
    r"\mu \leftarrow \beta_1 \mu + (1 - \beta_1)\, g",
    r"\nu \leftarrow \beta_2 \nu + (1 - \beta_2)\, g^2",
)
_HATS = r"\hat\mu = \frac{\mu}{1 - \beta_1^t}, \qquad \hat\nu = \frac{\nu}{1 - \beta_2^t}"
_ADAM = r"\frac{\hat\mu}{\sqrt{\hat\nu} + \epsilon}"
_PHI = r"x \leftarrow x - \eta\, \frac{\phi(\lVert x \rVert)}{\lVert u \rVert}\, u"
_RADAM = (
    r"\rho_\infty = \frac{2}{1 - \beta_2} - 1, \qquad "
    r"\rho_t = \rho_\infty - \frac{2 t \beta_2^t}{1 - \beta_2^t}",
    r"r_t = \sqrt{\frac{(\rho_t - 4)(\rho_t - 2)\, \rho_\infty}"
    r"{(\rho_\infty - 4)(\rho_\infty - 2)\, \rho_t}}",
)
_RECTIFIED = (
    r"u = \begin{cases} r_t\, \hat\mu / (\sqrt{\hat\nu} + \epsilon) "
    r"& \text{where } \rho_t \ge 5 \\ \hat\mu & \text{before} \end{cases}"
)

FORMULAS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "adadelta": (
            r"e_g \leftarrow \rho\, e_g + (1 - \rho)\, g^2",
            r"u = \frac{\sqrt{e_x + \epsilon}}{\sqrt{e_g + \epsilon}}\, g",
            r"e_x \leftarrow \rho\, e_x + (1 - \rho)\, u^2",
            r"x \leftarrow x - \eta\, u",
        ),
        "adagrad": (
            r"s \leftarrow s + g^2, \qquad s_0 = \text{initial accumulator value}",
            r"x \leftarrow x - \eta\, \frac{g}{\sqrt{s + \epsilon}}",
        ),
        "adam": (*_MOMENTS, _HATS, rf"x \leftarrow x - \eta\, {_ADAM}"),
        "adamw": (
            *_MOMENTS,
            _HATS,
            rf"x \leftarrow x - \eta \left( {_ADAM} + \lambda x \right)",
        ),
        "amsgrad": (
            *_MOMENTS,
            r"\nu_{\max} \leftarrow \max(\nu_{\max}, \nu)",
            r"x \leftarrow x - \eta\, \frac{\mu / (1 - \beta_1^t)}"
            r"{\sqrt{\nu_{\max} / (1 - \beta_2^t)} + \epsilon}",
        ),
        "bert_adamw": (
            *_MOMENTS,
            r"x \leftarrow x - \eta \left( \frac{\mu}{\sqrt{\nu} + \epsilon} + \lambda x \right)",
        ),
        "lamb": (*_MOMENTS, _HATS, rf"u = {_ADAM} + \lambda x", _PHI),
        "lars": (
            r"\text{ratio} = \frac{\tau\, \lVert x \rVert}"
            r"{\lVert g \rVert + \lambda \lVert x \rVert + \epsilon}, \qquad "
            r"1 \text{ where } \lVert x \rVert \text{ or } \lVert g \rVert \text{ is } 0",
            r"m \leftarrow \beta m + \eta\, \text{ratio}\, (g + \lambda x)",
            r"x \leftarrow x - m",
        ),
        "lars_ema": (
            r"u \leftarrow \beta_1 u + (1 - \beta_1)(g + \lambda x)",
            _PHI,
        ),
        "layerwise_adaptive": (r"u = \text{direction of the base}", _PHI),
        "lazy_adam": (
            r"\text{for each row } i \text{ that has a gradient } g_i \text{:}",
            r"\mu_i \leftarrow \beta_1 \mu_i + (1 - \beta_1)\, g_i",
            r"\nu_i \leftarrow \beta_2 \nu_i + (1 - \beta_2)\, g_i^2",
            r"x_i \leftarrow x_i - \eta\, \frac{\mu_i / (1 - \beta_1^t)}"
            r"{\sqrt{\nu_i / (1 - \beta_2^t)} + \epsilon}",
        ),
        "lookahead": (
            r"x \leftarrow x + \text{update of the inner optimizer}",
            r"\text{after steps } k, 2k, 3k, \ldots \text{:}",
            r"s \leftarrow s + \alpha (x - s), \qquad x \leftarrow s",
        ),
        "momentum": (
            r"m \leftarrow \beta m + g \qquad \text{(heavy ball), or}",
            r"m \leftarrow \beta m + (1 - \beta)\, g \qquad \text{(ema)}",
            r"x \leftarrow x - \eta\, m",
        ),
        "nadam": (
            *_MOMENTS,
            r"\tilde\mu = \frac{\beta_1 \mu}{1 - \beta_1^{t+1}} "
            r"+ \frac{(1 - \beta_1)\, g}{1 - \beta_1^t}",
            r"x \leftarrow x - \eta\, "
            r"\frac{\tilde\mu}{\sqrt{\nu / (1 - \beta_2^t)} + \epsilon}",
        ),
        "nesterov": (
            r"m \leftarrow \beta m + g",
            r"x \leftarrow x - \eta\, (\beta m + g)",
        ),
        "radam": (*_MOMENTS, _HATS, *_RADAM, _RECTIFIED, r"x \leftarrow x - \eta\, u"),
        "ranger": (
            *_MOMENTS,
            _HATS,
            *_RADAM,
            _RECTIFIED,
            r"x \leftarrow x - \eta\, (u + \lambda x)",
            r"\text{after steps } k, 2k, 3k, \ldots \text{:} \quad "
            r"s \leftarrow s + \alpha (x - s), \qquad x \leftarrow s",
        ),
        "rmsprop": (
            r"\nu \leftarrow \rho\, \nu + (1 - \rho)\, g^2",
            r"m \leftarrow \beta m + \eta\, \frac{g}{\sqrt{\nu + \epsilon}}",
            r"x \leftarrow x - m",
        ),
        "sgd": (
            r"m \leftarrow \beta m + (1 - d)\, g, \qquad m \leftarrow g \text{ at the first step}",
            r"x \leftarrow x - \eta\, m, \qquad "
            r"\text{with Nesterov } x \leftarrow x - \eta\, (\beta m + g)",
        ),
    }
)

# The arguments behind the letters. A letter that is absent from a formula is not explained there.
LETTERS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "learning_rate": {r"\eta": "the learning rate"},
        "b1": {r"\beta_1": "`b1`"},
        "b2": {r"\beta_2": "`b2`"},
        "eps": {r"\epsilon": "`eps`"},
        "rho": {r"\rho": "`rho`"},
        "decay": {r"\rho": "`decay`"},
        "momentum": {r"\beta": "`momentum`"},
        "dampening": {"d": "`dampening`"},
        "weight_decay": {r"\lambda": "`weight_decay`"},
        "trust_coefficient": {r"\tau": "`trust_coefficient`"},
        "phi_bounds": {r"\phi": "clipping to `phi_bounds` (without bounds, the identity)"},
        "sync_period": {"k": "`sync_period`"},
        "slow_step_size": {r"\alpha": "`slow_step_size`", "s": "the slow weights"},
    }
)
