# Of the tests of serving: a trained connector and a trained tower with held-out data. Read after lib.sh.

write_connector() { # file, run directory, steps
  cat >"$1" <<END
run: {directory: $2, seed: 7, steps: $3, log: 20, deadline: 60, threads: 0}
data: {path: $work/data, shuffle: 16, cache: 8, modalities: [{name: image, positions: none}, {name: text, positions: none}]}
model: {kind: connector, width: 16, embedding: 8, activation: gelu,
  moe: {experts: 4, choose: 2, hidden: 24, bias: true, noise: 0}}
objective: {directions: ["image:text", "text:image"], importance: 0, load: 0, z: 0}
optimizer: {batch: 8, rate: 0.01, warmup: 2}
schedule: {alternate: cyclic}
checkpoint: {interval: 0, keep: 10}
evaluate: {batch: 16, at_end: false}
END
}

# $work/run is a connector, $work/tower a tower, both trained a little; $work/data/validation has 53 samples, of
# which some lack a modality, with keys.
prepare_serving() {
  prepare samples=45 absent=6
  rm -rf "$work/data/validation"
  "$MAKE_SET" directory="$work/data/validation" samples=53 shards=3 first=5000 absent=6 keys=1
  write_connector "$work/connector.yaml" "$work/run" 30
  run 1 train "$work/connector.yaml"
  expect_status 0
  run 1 train "$work/config.yaml" --set run.directory="$work/tower"
  expect_status 0
}

embed() { # ranks, arguments...
  ranks=$1
  shift
  run "$ranks" embed "$@"
}
