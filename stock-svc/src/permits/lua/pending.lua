-- ARGV: before, limit. Answers: N when lost or rebuilding, otherwise O and (hold, grant) for each, oldest first.
if not is_open() then return { 'N' } end
local results = { 'O' }
local holds = redis.call('ZRANGEBYSCORE', PENDING, '-inf', '(' .. ARGV[1], 'LIMIT', 0, ARGV[2])
for _, hold in ipairs(holds) do
  local listed = redis.call('HGET', GRANTS, hold)
  if listed then
    results[#results + 1] = hold
    results[#results + 1] = listed
  end
end
return results
