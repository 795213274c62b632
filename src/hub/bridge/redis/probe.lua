-- Sends a hub its probe, behind all live messages so far, and keeps the lease of the one that takes in plain events.
-- KEYS 1 meta, 2 lease
-- ARGV 1 hub, 2 its probe channel, 3 number, 4 length of the lease in milliseconds
local meta = redis.call('HMGET', KEYS[1], 'epoch', 'head')
local holder = redis.call('GET', KEYS[2])
local mine = '0'
if not holder or holder == ARGV[1] then
  redis.call('SET', KEYS[2], ARGV[1], 'PX', ARGV[4])
  mine = '1'
end
local place = (meta[1] or '-') .. ' ' .. (meta[2] or '0') .. ' ' .. mine
redis.call('PUBLISH', ARGV[2], 'P ' .. ARGV[3] .. ' ' .. place .. '\n')
return place
