#!/bin/sh
# The whole model on one GPU, from nothing: data, vocabulary, autoencoder, text encoder and U-Net, judge, scores, card.
# Stopped and started again it goes on where it was. From the repository's root: sh recipes/emoji/gpu.sh
set -eu

[ -f data/sprites/index.json ] || python -m recipes.emoji.build --out data/sprites
[ -f data/vocabulary/vocab.json ] || python -m recipes.emoji.vocabulary --data data/sprites --out data/vocabulary

reverie train autoencoder recipes/emoji/gpu_autoencoder.toml
reverie train diffusion recipes/emoji/gpu_diffusion.toml
[ -d runs/gpu-model ] || python -m recipes.emoji.meanings --model runs/gpu-diffusion/export \
    --config recipes/emoji/gpu_diffusion.toml --out runs/gpu-model
reverie train judge recipes/emoji/gpu_judge.toml

reverie evaluate scenes --model runs/gpu-model --judge runs/gpu-judge/export \
    --config recipes/emoji/gpu_diffusion.toml --count 500 --out runs/gpu-evaluation
python -m recipes.emoji.card --evaluation runs/gpu-evaluation --autoencoder recipes/emoji/gpu_autoencoder.toml \
    --diffusion recipes/emoji/gpu_diffusion.toml --model runs/gpu-model \
    --on "$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1)"
