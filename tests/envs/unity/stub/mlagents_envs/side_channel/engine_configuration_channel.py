class EngineConfigurationChannel:
    def set_configuration_parameters(self, time_scale, target_frame_rate, capture_frame_rate):
        self.time_scale = time_scale
