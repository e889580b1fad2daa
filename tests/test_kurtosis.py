"""The callback adds the paper's penalty, warms it up by the global step, logs each site, and it acts."""

import functools

import pytest
from lightning.pytorch import Callback
from small_fit import Losses, datamodule, lit_module, trainer, write_corpus

from lit_actreg.callbacks.clip_schedule import ClipSchedule
from lit_actreg.callbacks.kurtosis import KurtosisRegularization
from lit_actreg.config import SITES, QuantConfig
from lit_actreg.contracts import LossTerm
from lit_actreg.quant.statistics import token_kurtosis

pytestmark = pytest.mark.usefixtures("one_thread")
PLAIN = QuantConfig(activations="none")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("kurtosis") / "corpus")


def test_lambda_rises_linearly_to_its_weight():
    callback = KurtosisRegularization(4e-5, warmup_steps=4)
    assert [callback.coefficient(step) for step in range(6)] == pytest.approx([1e-5, 2e-5, 3e-5, 4e-5, 4e-5, 4e-5])
    assert KurtosisRegularization(4e-5).coefficient(0) == 4e-5


def test_there_is_no_term_without_weight_or_sites():
    def terms(**options):
        return KurtosisRegularization(**options).loss_terms(lit_module())

    assert terms()["kurtosis"].sites == SITES
    assert terms(sites=["mlp_in"])["kurtosis"].sites == ("mlp_in",)
    assert terms(weight=0.0) == terms(sites=[]) == {}
    with pytest.raises(ValueError, match=r"kurtosis\.weight -1\.0 is negative"):
        KurtosisRegularization(-1.0)


class SeenKurtosis(Callback):
    """The statistic of every block's output at the given sites, by hooks, in the first batch."""

    def __init__(self, sites) -> None:
        self.sites = sites
        self.found: dict[tuple[int, str], float] = {}

    def on_train_start(self, trainer, pl_module):
        for layer, block in enumerate(pl_module.model.blocks):
            for site in self.sites:
                getattr(block, site).register_forward_hook(functools.partial(self.see, (layer, site)))

    def see(self, key, module, args, output):
        self.found.setdefault(key, token_kurtosis(output[:, 2::4]).item())  # one token in four, as by default


def test_loss_and_log_are_cross_entropy_and_lambda_times_the_sum(corpus):
    sites = ("qkv", "mlp_proj")
    seen, losses = SeenKurtosis(sites), Losses()
    engine = trainer([KurtosisRegularization(0.01, list(sites), warmup_steps=2), losses, seen], steps=1)
    engine.fit(lit_module(PLAIN), datamodule=datamodule(corpus))
    assert len(seen.found) == 4
    penalty = 0.01 / 2 * sum(seen.found.values())
    log = engine.logger
    assert log.of("kurtosis/penalty")[0] == pytest.approx(penalty, rel=1e-5)
    assert losses.values[0] - log.of("train/loss")[0] == pytest.approx(penalty, rel=1e-3)
    for site in sites:
        assert log.of(f"kurtosis/{site}")[0] == pytest.approx((seen.found[0, site] + seen.found[1, site]) / 2, rel=1e-5)
    assert not log.of("kurtosis/mlp_in")


@pytest.mark.parametrize("quant", [PLAIN, QuantConfig()])
def test_it_lowers_kurtosis(corpus, quant):
    last = []
    for weight in (1e-9, 1e-2):
        engine = trainer([KurtosisRegularization(weight), ClipSchedule()], steps=20)
        engine.fit(lit_module(quant), datamodule=datamodule(corpus))
        last.append(sum(engine.logger.of(f"kurtosis/{site}")[19] for site in SITES))
    assert last[1] < 0.8 * last[0]


def test_warm_up_continues_at_the_global_step_after_a_resume(corpus, tmp_path):
    def fit(steps, resume_from=None):
        engine = trainer([KurtosisRegularization(0.01, warmup_steps=10)], steps)
        engine.fit(lit_module(PLAIN), datamodule=datamodule(corpus), ckpt_path=resume_from)
        return engine

    whole = fit(6).logger.of("kurtosis/penalty")
    fit(3).save_checkpoint(tmp_path / "x.ckpt")
    resumed = fit(6, tmp_path / "x.ckpt").logger.of("kurtosis/penalty")
    assert list(resumed) == [3, 4, 5]
    assert resumed == {step: whole[step] for step in resumed}


@pytest.mark.parametrize("accumulate", [1, 3])
def test_everything_is_logged_at_the_steps_that_loggers_take(corpus, accumulate):
    options = {"log_every_n_steps": 2, "accumulate_grad_batches": accumulate}
    engine = trainer([KurtosisRegularization(0.01)], steps=5, **options)
    engine.fit(lit_module(PLAIN), datamodule=datamodule(corpus))
    names = ["train/loss", "train/gradient_norm", "kurtosis/penalty", *(f"kurtosis/{site}" for site in SITES)]
    assert [list(engine.logger.of(name)) for name in names] == [[1, 3]] * len(names)


def test_a_fit_has_the_terms_of_its_own_callbacks(corpus):
    """Whatever the module was used for before: a validation, a fit with other terms."""
    module, data = lit_module(PLAIN), datamodule(corpus)
    trainer([], limit_val_batches=1).validate(module, datamodule=data, verbose=False)
    for sites in (["mlp_proj"], ["qkv", "mlp_in"], []):
        seen = SeenKurtosis(sites)
        engine = trainer([KurtosisRegularization(0.01, sites), seen], steps=1)
        engine.fit(module, datamodule=data)
        logged = {site: engine.logger.of(f"kurtosis/{site}") for site in SITES}
        assert [site for site in SITES if logged[site]] == [site for site in SITES if site in sites]
        for site in sites:
            assert logged[site][0] == pytest.approx((seen.found[0, site] + seen.found[1, site]) / 2, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_nth_token": 0}, "every_nth_token 0 is no number of tokens: use 1 or more"),
        ({"every_nth_token": 2.5}, "every_nth_token 2.5 is no number"),
        ({"every_nth_token": 2, "of": "weight"}, "itself, of outputs: leave it out"),
        ({"every_nth_token": 2, "statistic": functools.partial(token_kurtosis, every_nth_token=2)}, "leave it out"),
    ],
)
def test_every_nth_token_is_refused_where_it_means_nothing(options, message):
    with pytest.raises(ValueError, match=message):
        LossTerm(**{"statistic": token_kurtosis} | options)


def test_what_is_no_loss_term_is_refused(corpus):
    for sites in ("qkv", ("mlp",)):
        with pytest.raises(ValueError, match=r"a loss term's sites .* are not some of"):
            LossTerm(token_kurtosis, sites)

    class Unreduced(Callback):
        def loss_terms(self, module):
            return {"unreduced": LossTerm(lambda y: y.square().mean(-1))}

    for compiled in (False, True):
        with pytest.raises(ValueError, match=r"statistic is a scalar, not of shape \(8, 16\)"):
            trainer([Unreduced()]).fit(lit_module(PLAIN, compile=compiled), datamodule=datamodule(corpus))
    twice = [KurtosisRegularization(), KurtosisRegularization()]
    with pytest.raises(ValueError, match=r"loss terms of one name, \['kurtosis'\]"):
        trainer(twice).fit(lit_module(PLAIN), datamodule=datamodule(corpus))
