-- ARGV: epoch, then (hold, grant epoch, quantity, at, buyer) for each hold.
if not is_claimed(ARGV[1]) then return 0 end
for i = 2, #ARGV, 5 do
  local grant = ARGV[i + 1] .. '|' .. ARGV[i + 2] .. '|' .. ARGV[i + 3] .. '|' .. ARGV[i + 4]
  if redis.call('HSETNX', GRANTS, ARGV[i], grant) == 1 then
    count_in(ARGV[i + 4], tonumber(ARGV[i + 2]), ARGV[i])
  end
end
return 1
