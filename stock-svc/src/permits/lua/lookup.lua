-- ARGV: holds. Answers: nothing when lost or rebuilding, otherwise one text for each, empty when it is not there.
if not is_open() then return {} end
local results = {}
for i = 1, #ARGV do results[i] = redis.call('HGET', GRANTS, ARGV[i]) or '' end
return results
