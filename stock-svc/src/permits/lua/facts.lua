-- ARGV: the facts.
if redis.call('EXISTS', HEADER) == 0 then return 0 end
update_facts(ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6], ARGV[7])
return 1
