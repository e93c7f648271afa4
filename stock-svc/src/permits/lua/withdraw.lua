-- ARGV: quantity. Answers: D done, F too few, U unavailable.
if not is_open() then return 'U' end
local free, quantity = number('free'), tonumber(ARGV[1])
if free < quantity then return 'F' end
redis.call('HSET', HEADER, 'free', int(free - quantity), 'version', int(number('version') + 1))
return 'D'
