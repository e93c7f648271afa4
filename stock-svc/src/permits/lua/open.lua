-- ARGV: epoch, available, snapshot sequence, then the facts.
if not is_claimed(ARGV[1]) then return 0 end
redis.call('HSET', HEADER, 'phase', 'O', 'free', ARGV[2], 'snapshot', ARGV[3])
update_facts(ARGV[4], ARGV[5], ARGV[6], ARGV[7], ARGV[8], ARGV[9], ARGV[10])
return 1
