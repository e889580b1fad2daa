# lit-actreg: `make help` lists the targets. Every target makes the environment it needs in .venv.
PYTHON ?= python3
BIN := .venv/bin
RUN := runs/demo-$(shell date +%Y%m%d-%H%M%S)
PLAIN := --model.quant.activations none --kurtosis.weight 0
SEEDS := 1 2 3
# Rows of the study: a fit each, with the options of its variable. Larger: CONFIG=… DATA="--data.source …"
ROWS := plain kurtosis qat both weight_kurtosis weight_norm clamp quest
CONFIG := configs/fit_demo.yaml
DATA :=
OPTIONS :=
ROW_plain := $(PLAIN)
ROW_kurtosis := --model.quant.activations none
ROW_qat := --kurtosis.weight 0
ROW_both :=
ROW_weight_kurtosis := --kurtosis.weight 0 --weight_penalty.kind kurtosis --weight_penalty.weight 1
ROW_weight_norm := --kurtosis.weight 0 --weight_penalty.kind linf --weight_penalty.weight 1
ROW_clamp = --model.quant.activations clamp --kurtosis.weight 0 --clips.lr 0 --clips.from_checkpoint $(call LAST,qat)
ROW_quest := --model.quant.activations quest --kurtosis.weight 0
# A fit into $(RUN), followed by its name and options; its last checkpoint; a table of checkpoints
FIT = $(BIN)/lit-actreg fit --config $(CONFIG) $(DATA) --trainer.logger.init_args.save_dir $(RUN) \
  --trainer.logger.init_args.name tensorboard --trainer.logger.init_args.version
LAST = $(RUN)/tensorboard/$(1)/checkpoints/last.ckpt
TABLE = $(BIN)/lit-actreg table --config configs/table.yaml --calibration_tokens 32768 --output $(RUN)/table --checkpoints
comma := ,
# mypy does not follow an editable install's folder mapping; links under the packages' names do
MYPY = mkdir -p build/mypy && ln -sfn ../../plugins build/mypy/lit_actreg_plugins && \
  ln -sfn ../../kernels build/mypy/lit_actreg_kernels && MYPYPATH=build/mypy $(BIN)/mypy

.PHONY: help demo demo-seeds study test test-slow test-gpu bench bench-train lint
help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e .
	@touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: .venv/installed  ## train, quantize and validate a small W4A4 model beside its plain twin, on any machine
	$(FIT) actreg
	$(FIT) plain $(PLAIN)
	for method in RTN GPTQ; do \
	  $(BIN)/lit-actreg quantize --config configs/quantize.yaml --quantizer $$method \
	    --ckpt_path $(call LAST,actreg) --output $(RUN)/artifacts/$$method --calibration_tokens 32768 && \
	  $(BIN)/lit-actreg validate --config configs/validate_w4a4.yaml --ckpt_path $(RUN)/artifacts/$$method || exit 1; \
	done
	$(TABLE) '{actreg: $(call LAST,actreg), plain: $(call LAST,plain)}'
	@echo "W4A4 artifacts (Hugging Face checkpoints): $(RUN)/artifacts"
	@echo "Training curves: $(BIN)/tensorboard --logdir $(RUN)/tensorboard"

demo-seeds: .venv/installed  ## the demo's models over three seeds, in one table; OPTIONS="…" are the first one's
	for seed in $(SEEDS); do \
	  $(FIT) actreg-$$seed --seed_everything $$seed --data.seed $$seed $(OPTIONS) && \
	  $(FIT) plain-$$seed --seed_everything $$seed --data.seed $$seed $(PLAIN) || exit 1; \
	done
	$(TABLE) '{$(foreach s,$(SEEDS),actreg-$(s): $(call LAST,actreg-$(s))$(comma) plain-$(s): $(call LAST,plain-$(s))$(comma))}'

study: .venv/installed  ## every row of the study and its table, here in small: docs/study.md
	$(foreach row,$(ROWS),$(FIT) $(row) $(ROW_$(row)) && ) true
	$(TABLE) '{$(foreach row,$(filter-out quest,$(ROWS)),$(row): $(call LAST,$(row))$(comma))}' $(DATA)

test: .venv/installed-dev  ## the tests, without a GPU
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MYPY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m 'not slow and not gpu' --numprocesses auto --maxprocesses 4 --dist loadfile

test-slow: .venv/installed-dev  ## the tests that take minutes
	$(BIN)/pytest -m slow

GPU_TESTS := dependent_launch act_quant norm_quant gelu_quant int4_linear int4_gemv int4_grouped \
  int4_grouped_gemv dequantize int4_hopper int4_hopper_decode int4_tile norm_int4_linear \
  decode_attention int4_block generate ops gptq_columns gptq fake_quant fake_quant_kernel \
  norm_fake_quant gelu_fake_quant swiglu narrow_linear cross_entropy linear_cross_entropy \
  rotary kurtosis_kernel training_ops replay synchronization
test-gpu:  ## kernel tests and those that need a GPU, in the environment at hand
	$(PYTHON) -m pytest $(GPU_TESTS:%=tests/test_%.py)

bench:  ## the W4A4 linear and a 1 B W4A4 model against bf16 on this GPU, in the environment at hand
	$(PYTHON) benchmarks/int4_linear.py
	$(PYTHON) benchmarks/model_speed.py --size 1b

bench-train:  ## what QAT and kurtosis cost a training step on this GPU, in the environment at hand
	$(PYTHON) benchmarks/train_speed.py

lint: .venv/installed-dev  ## format and check
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(MYPY)
