set -x
python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .whl/*.whl || exit 1
export PYTHONPATH=/tmp/site PYTHONUNBUFFERED=1 
nvidia-smi --query-gpu=name,driver_version --format=csv
( time timeout 150 python3 -m pytest -q -m gpu tests/test_kernels.py tests/test_qlinear.py tests/test_speed.py tests/test_quality.py -x 2>&1 | tail -15 )
( time timeout 200 python3 -m compress -m recipe=bf16,rtn4,gptq4,awq4,awq_gptq4 output_dir=/tmp/out >$OUT/sweep.log 2>$OUT/sweep.err ); tail -5 $OUT/sweep.err; grep -v '^{' $OUT/sweep.log | tail -60
mkdir -p $OUT/runs; for d in /tmp/out/reference/*/; do n=$(basename $d); cp $d/run.json $OUT/runs/${n%%-*}.json; done
cp /tmp/out/reference/awq4*/frontier.png $OUT/ 
( time timeout 200 python3 -m compress.eval.scale --shape llama-3-8b --blocks 3 --methods rtn4,gptq4,awq4 --sequences 128 --length 2048 --batch 8 --out $OUT/scale.json 2>&1 | tail -8 )
tar czf $OUT/runs.tgz -C $OUT runs; rm -rf $OUT/runs
