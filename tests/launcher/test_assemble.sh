# Dense decoders of one base, assembled: by the command and as a stage; equal to the base where every slot is the base's;
# refusals that leave nothing.
. "$(dirname "$0")/lib.sh"

write_config() { # file run-directory extra-lines
  cat >"$1" <<END
run: {directory: $2, seed: 7, steps: 6, log: 5, deadline: 60, threads: 1}
data: {path: $work/data, shuffle: 16, cache: 8,
  modalities: [{name: image, positions: none}, {name: text, positions: none}]}
model: {kind: decoder, vocabulary: 30, width: 16, layers: 4, heads: 2, hidden: 24,
  moe: {layers: none, experts: 3, choose: 2, hidden: 24, gate: renormalised, noise: 0}}
objective: {importance: 0, load: 0, z: 0}
optimizer: {batch: 8, rate: 0.003, warmup: 2, weight_decay: 0}
checkpoint: {interval: 0, keep: 10}
evaluate: {batch: 16, at_end: false}
END
}
"$MAKE_SET" directory="$work/data/train" samples=45 vocabulary=30 || exit 1
"$MAKE_SET" directory="$work/data/validation" samples=21 shards=1 first=5000 vocabulary=30 || exit 1

write_config "$work/stages.yaml" "$work/run"
cat >>"$work/stages.yaml" <<END
stages:
  - {name: base}
  - name: image
    from: base
    set: ["data.use=[image]", "model.lora=[{parameters: blocks.*.feed_forward.*, rank: 2}]", checkpoint.contents=trained,
      "optimizer.frozen=[blocks.*attention*, blocks.*norm*, final_norm.*, embedding.*, output.*]"]
  - name: both
    from: base
    set: [run.steps=4, "optimizer.frozen=[blocks.*attention*, blocks.*norm*, final_norm.*, embedding.*, output.*]"]
  - name: assembled
    kind: assemble
    assemble: {base: base, slots: [image, both, base], connectors: ["image:image", "text:both"]}
    set: [model.moe.layers=second half]
  - {name: tune, from: assembled, set: [model.moe.layers=second half]}
END
what="a stage of its own"
run 2 train "$work/stages.yaml"
expect_status 0
expect_text "$work/err" "[assembled] slot 1: $(step_path "$work/run/both" 4)" "[assembled] connector.image: $(step_path "$work/run/image" 6)" \
  "8 adapters are merged" "[assembled] assembled" "[tune] began with"
expect_text "$work/run/assembled/manifest.json" '"for":	"slot 2"' '"blocks.*.router"'
made=$(content "$(step_path "$work/run/assembled" 0)")

what="the same by the command, on one rank"
cp "$work/run/assembled/config.yaml" "$work/moe.yaml"
base=$(step_path "$work/run/base" 6) image=$(step_path "$work/run/image" 6) both=$(step_path "$work/run/both" 4)
run 1 assemble "$work/moe.yaml" --base "$base" --slots "$image,$both,base" --connectors "image=$image,text=$both" -o "$work/made"
expect_status 0
expect_equal "content" "$made" "$(content "$work/made/step-00000000")"
what="each tensor is its source's"
export_of() { # checkpoint name: as safetensors
  run 1 export "$1" -o "$work/export.$2"
  expect_status 0
}
tensor() { # name-of-export tensor: checksum of its bytes
  file=$work/export.$1/model.safetensors
  header=$(od -An -tu8 -N8 "$file" | tr -d ' ')
  range=$(tail -c +9 "$file" | head -c "$header" | tr '}' '\n' | sed -n "s/.*\"$2\":.*\"data_offsets\":\[\([0-9]*\),\([0-9]*\)\].*/\1 \2/p")
  [ -n "$range" ] || fail "expected a tensor $2 in the export of $1"
  tail -c +$((8 + header + ${range% *} + 1)) "$file" | head -c $((${range#* } - ${range% *})) | cksum
}
export_of "$base" base
run 1 merge "$image" -o "$work/merged"
expect_status 0
export_of "$work/merged/step-00000006" image
export_of "$both" both
export_of "$(step_path "$work/run/assembled" 0)" made
for matrix in gate up down; do
  slot=0
  for source in image both base; do
    for layer in 2 3; do
      expect_equal "layer $layer, expert $slot, $matrix" "$(tensor $source model.layers.$layer.mlp.${matrix}_proj.weight)" \
        "$(tensor made model.layers.$layer.mlp.experts.$slot.${matrix}_proj.weight)"
    done
    slot=$((slot + 1))
  done
done
for name in model.layers.3.self_attn.q_proj.weight model.layers.1.mlp.up_proj.weight model.norm.weight lm_head.weight; do
  expect_equal $name "$(tensor base $name)" "$(tensor made $name)"
done
expect_equal "connector of image" "$(tensor image antiphon.connector.image.first.weight)" "$(tensor made antiphon.connector.image.first.weight)"
expect_equal "connector of text" "$(tensor both antiphon.connector.text.first.weight)" "$(tensor made antiphon.connector.text.first.weight)"
[ "$(tensor image model.layers.2.mlp.up_proj.weight)" != "$(tensor both model.layers.2.mlp.up_proj.weight)" ] ||
  fail "expected the sources to differ"

what="lists of layers"
run 1 assemble "$work/moe.yaml" --base "$base" --slots "$image,$both,base;$image,$both,base" --connectors "image=$image,text=$both" -o "$work/made2"
expect_status 0
expect_equal "content" "$made" "$(content "$work/made2/step-00000000")"
run 1 assemble "$work/moe.yaml" --base "$base" --slots "$image,$both,base;$image,base,$both" --connectors "image=$image,text=$both" -o "$work/made3"
expect_status 0
[ "$made" != "$(content "$work/made3/step-00000000")" ] || fail "expected another content with other slots"

loss() { # checkpoint: of the captions of the validation split
  run 1 eval "$1" "$work/data" --split validation
  expect_status 0
  sed -n 's/.*loss[^0-9]*\([0-9.]*\).*/\1/p' "$work/out" "$work/err" | head -1
}
what="pure: every slot the base's"
run 1 assemble "$work/moe.yaml" --base "$base" --slots base,base,base -o "$work/pure"
expect_status 0
before=$(loss "$base") after=$(loss "$work/pure/step-00000000")
[ -n "$before" ] || fail "expected a loss"
awk -v a="$before" -v b="$after" 'BEGIN {exit !(a > 0 && (a - b) ^ 2 <= (2e-4 * a) ^ 2)}' || fail "expected the base's loss $before, got $after"
expect_equal "loss with other slots" other "$([ "$(loss "$work/made/step-00000000")" = "$before" ] || echo other)"

# ---- refusals ----

refused() { # words... -- arguments of assemble
  words=
  rm -rf "$work/none"
  wanted=$1
  shift
  run 2 assemble "$work/moe.yaml" --base "$base" -o "$work/none" "$@"
  expect_status 1
  expect_error "$wanted"
  [ -e "$work/none" ] && fail "expected nothing to be written"
}
other() { # name settings...: a decoder of its own
  name=$1
  shift
  rm -rf "$work/$name"
  run 1 train "$work/stages.yaml" --set stages=[] --set run.directory="$work/$name" --set run.steps=1 "$@"
  expect_status 0
}
what="slots of another number"
refused "layer 2 has 3 experts, but 2 slots are filled" --slots "$image,$both"
what="not of one base"
other foreign --set run.seed=8
refused "differs from that of the base" --slots "$image,$(step_path "$work/foreign" 1),base"
what="adapters in the target"
refused "leave model.lora empty" --slots "$image,$both,base" --connectors "image=$image,text=$both" \
  --set "model.lora=[{parameters: blocks.*.experts.*, rank: 2}]"
what="another width"
other wide --set model.width=20
refused "was trained with model.width 20, the assembly has 16" --slots "$image,$(step_path "$work/wide" 1),base"
what="other layers"
other deep --set model.layers=5
refused "model.layers 5" --slots "$(step_path "$work/deep" 1),base,base"
what="another vocabulary"
other words --set model.vocabulary=31
refused "model.vocabulary 31" --slots "$(step_path "$work/words" 1),base,base"
what="another activation"
other gelu --set model.activation=gelu
refused "model.activation" --slots "$(step_path "$work/gelu" 1),base,base"
what="another inner width"
other inner --set model.hidden=32
refused "'parameter/blocks.2.feed_forward.in.weight' is float32 [64, 16], 'parameter/blocks.2.experts.0.in.weight' is to be float32 [48, 16]" \
  --slots "$(step_path "$work/inner" 1),base,base"
what="a mixture as a source"
refused "lacks 'parameter/blocks.2.feed_forward.in.weight'" --slots "$work/made/step-00000000,base,base"
what="no connector"
other single --set data.use=[image]
refused "has no connector of 'text'" --slots base,base,base --connectors "text=$(step_path "$work/single" 1)"
what="no such checkpoint"
refused "nowhere" --slots "$work/nowhere,base,base"
what="no mixtures"
refused "no layer with a mixture" --slots base,base,base --set model.moe.layers=none
what="there already"
run 1 assemble "$work/moe.yaml" --base "$base" --slots base,base,base -o "$work/pure"
expect_status 1
expect_error "is there already"
what="stages that are no assembly"
stage_refused() { # words sed-script
  sed "$2" "$work/stages.yaml" >"$work/other.yaml"
  run 1 train "$work/other.yaml" --set run.directory="$work/none"
  expect_status 1
  expect_error "'assembled'" "$1"
  [ -e "$work/none" ] && fail "expected nothing to be written"
}
stage_refused "assemble.base 'none'" 's/{base: base, /{/'
stage_refused "either slots" 's/slots: .image, both, base.,/slots: [],/'
stage_refused "it is not done before" 's/slots: .image/slots: [tune/'
stage_refused "there is no such stage" 's/slots: .image/slots: [image2/'
stage_refused "assemble.connectors 'smell:image'" 's/image:image/smell:image/'
stage_refused "it has assemble.base, no" 's/kind: assemble/kind: assemble, from: base/; s/kind: assemble, from/from: base\n    kind: assemble #/'
stage_refused "fills the slots of 1 layers, the model has 2" 's/slots: .image, both, base.,/layers: ["image, both, base"],/'
what="arguments"
run 1 assemble "$work/moe.yaml" --slots base -o "$work/none"
expect_status 2
run 1 assemble "$work/moe.yaml" --base "$base" --slots base,base,base --connectors "smell=$image" -o "$work/none"
expect_status 2
finish
