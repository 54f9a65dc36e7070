python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .whl/*.whl || exit 1
export PYTHONPATH=/tmp/site PYTHONUNBUFFERED=1 
( time timeout 100 python3 -m compress.eval.scale --shape llama-3-8b --blocks 3 --methods gptq4,awq4 --sequences 128 --length 2048 --batch 8 --out $OUT/scale.json 2>&1 | grep -v '^{' | tail -5 )
( time timeout 190 python3 -m compress -m recipe=bf16,rtn4,gptq4,awq4,awq_gptq4 output_dir=/tmp/out >$OUT/sweep.log 2>$OUT/sweep.err ); tail -3 $OUT/sweep.err; grep -E "^(quantize|verify|bench|eval):|verified" $OUT/sweep.err
( time python3 -c "
from pathlib import Path
from compress.eval.scale import write_random_model
p=Path('/tmp/llama-8b-shape-16-blocks'); p.mkdir(); write_random_model(p,'llama-3-8b',16)" )
( time timeout 130 python3 -m compress recipe=rtn4 model=/tmp/llama-8b-shape-16-blocks eval.enabled=false 'bench.batch_sizes=[1,4,16]' bench.prompt_tokens=512 bench.decode_tokens=64 output_dir=/tmp/out8 >$OUT/big.log 2>$OUT/big.err ); tail -3 $OUT/big.err; grep -v '^{' $OUT/big.log | head -40
mkdir -p $OUT/r; for d in /tmp/out/reference/*/ /tmp/out8/*/*/; do n=$(basename $d); m=$(basename $(dirname $d)); cp $d/run.json $OUT/r/$m.${n%%-*}.json; done
cp $(ls -d /tmp/out/reference/awq4*)/frontier.png $OUT/ ; cp $(ls -d /tmp/out/reference/awq_gptq4*)/report.html $OUT/report.html; 
tar czf $OUT/runs.tgz -C $OUT r; rm -rf $OUT/r
( time timeout 110 python3 -m pytest -q -m gpu tests/test_qlinear.py tests/test_speed.py tests/test_quality.py tests/test_pipeline.py 2>&1 | tail -15 )
