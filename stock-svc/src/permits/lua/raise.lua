-- ARGV: epoch, version, offered, missing, release sequence.
if not is_open() or get('epoch') ~= ARGV[1] or get('version') ~= ARGV[2] then return 0 end
if number('free') + number('granted') ~= tonumber(ARGV[3]) then return 0 end
redis.call('HSET', HEADER, 'free', int(number('free') + tonumber(ARGV[4])),
  'snapshot', int(math.max(number('snapshot'), tonumber(ARGV[5]))), 'version', int(number('version') + 1))
return 1
