#!/usr/bin/env bash
# Makes the runs in this folder: a run that was stopped within an epoch, and one of text with Muon and a cosine. They
# are kept as they were written before the options of the network had one home, so that such runs still go on.
# Usage: make.sh CLONE, where `git -C CLONE checkout eb34e96` was done and its packages are installed. It prints the
# losses that they end with there.
set -euo pipefail
clone=$(cd "$1" && pwd)
here=$(cd "$(dirname "$0")" && pwd)
cd "$(mktemp -d)"
sizes=(--model.embed_dim=8 --model.num_heads=2 --model.num_layers=1 --model.hidden_dim=16 --model.max_seq_len=16)
common=("${sizes[@]}" --trainer.precision=32-true --trainer.max_epochs=-1 --trainer.accelerator=cpu
    --trainer.log_every_n_steps=1 --watch={samples:\ false,attention:\ false,embedding:\ false,loss_figure:\ false})
export PYTHONPATH=$clone OMP_NUM_THREADS=1
cp "$clone/LICENSE" text.txt
python "$clone/train.py" "${common[@]}" --model.vocab_size=20 --data.num_tokens=2000 --data.batch_size=8 \
    --model.dropout=0.1 --trainer.max_steps=20
python "$clone/train.py" "${common[@]}" --model.vocab_size=256 --data=TextData --data.path=text.txt \
    --data.batch_size=4 --model.optimizer=muon --model.schedule=cosine --model.learning_rate=0.01 \
    --trainer.max_steps=10 --trainer.val_check_interval=5
for number in 0 1; do
    run=runs/version_$number
    mkdir -p "$here/version_$number/checkpoints"
    sed "s#$PWD/##" "$run/config.yaml" > "$here/version_$number/config.yaml"
    cp "$run/simple_language_model.pt" "$here/version_$number/"
    cp "$run/checkpoints/last.ckpt" "$here/version_$number/checkpoints/"
    python "$clone/train.py" --ckpt_path "$run" --trainer.max_steps 40 2>&1 | grep val/loss | tail -1
done
