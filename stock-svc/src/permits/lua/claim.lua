-- ARGV: epoch, server, then the facts. Answers: 0, or the epoch that is there and not older.
local there = number('epoch')
if there and there >= tonumber(ARGV[1]) then return int(there) end
redis.call('DEL', HEADER, GRANTS, DONE, BUYERS, PENDING)
redis.call('HSET', HEADER, 'epoch', ARGV[1], 'phase', 'R', 'free', '0', 'granted', '0', 'snapshot', '0',
  'version', '0', 'server', ARGV[2])
update_facts(ARGV[3], ARGV[4], ARGV[5], ARGV[6], ARGV[7], ARGV[8], ARGV[9])
return '0'
