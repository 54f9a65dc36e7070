python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .whl/*.whl || exit 1
export PYTHONPATH=/tmp/site PYTHONUNBUFFERED=1 
( time timeout 150 python3 -m compress -m recipe=bf16,rtn4,gptq4,awq4,awq_gptq4 output_dir=outputs >$OUT/sweep.log 2>$OUT/sweep.err ); grep -E "^(quantize|verify|bench|eval):|verified" $OUT/sweep.err; tail -2 $OUT/sweep.err
python3 -m compress.eval.compare outputs/reference | grep -v '^\[' | tee $OUT/table.md
mkdir -p $OUT/r; for d in outputs/reference/*/; do n=$(basename $d); cp $d/run.json $OUT/r/${n%%-*}.json; done
cp $(ls -d outputs/reference/awq_gptq4*)/frontier.png $OUT/ 
tar czf $OUT/runs.tgz -C $OUT r; rm -rf $OUT/r
