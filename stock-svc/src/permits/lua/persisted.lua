-- ARGV: epoch, then holds.
if not is_open() then return 0 end
for i = 2, #ARGV do
  local listed = redis.call('HGET', GRANTS, ARGV[i])
  if listed and parse_grant(listed).epoch == ARGV[1] then redis.call('ZREM', PENDING, ARGV[i]) end
end
return 1
