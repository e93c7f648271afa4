-- ARGV: epoch, version, excess. Answers: the units taken; -1 when something was corrected since it was decided.
if not is_open() or get('epoch') ~= ARGV[1] or get('version') ~= ARGV[2] then return '-1' end
local free = number('free')
local taken = math.min(tonumber(ARGV[3]), free)
redis.call('HSET', HEADER, 'free', int(free - taken), 'version', int(number('version') + 1))
return int(taken)
